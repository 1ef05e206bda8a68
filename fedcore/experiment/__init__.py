"""What protection and federation cost: the runs that are compared, their gaps, and what each party held."""
