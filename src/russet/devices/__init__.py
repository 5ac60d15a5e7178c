"""What the machine is and what to do on it; knows no model: facts, known bugs, memory estimates, the plan."""
