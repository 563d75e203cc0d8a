"""What the small worlds are made of: letters, a tiny network, a tree of answers, exact gradients."""
