"""What a prompt with an image costs, part by part, pruned and unpruned."""
