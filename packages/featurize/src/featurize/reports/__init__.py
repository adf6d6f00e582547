"""What people read about stores: `info` (words and figure) and `ls`. May import everything below, and no network."""
