"""Stream the texts of one file, a format each, in memory that does not grow with the file."""
