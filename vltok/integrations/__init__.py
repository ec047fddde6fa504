"""vltok inside programs that run models themselves, a folder for each."""
