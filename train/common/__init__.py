"""Building blocks that every other sub-package uses: errors, command line, files, schemas and progress."""
