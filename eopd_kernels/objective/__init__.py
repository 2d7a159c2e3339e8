"""What is minimised on each token: the halves, the gates, and an Objective made of them."""
