"""What goes wrong in runs, on purpose, in numbers: each script says in its last line how much it tried and survived."""
