"""What everything else stands on: errors, the command line, files, schemas and progress."""
