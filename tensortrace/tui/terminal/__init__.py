"""What goes to the terminal and comes from it: colours, lines that cost little, painting, keys."""
