"""What was measured, for people: tables, pages, pictures."""
