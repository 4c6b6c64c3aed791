"""How the loss surface settles as the sample grows (Kiselev & Grabovoy 2024), and how many samples are enough."""
