"""Reports: tables, pages, pictures."""
