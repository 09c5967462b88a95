"""HomoDistil: the student starts as its teacher, units only leave, masked is cut, and a killed run goes on."""

CONTRACT = {"keep": 0.7, "steps": 2, "batch": 4, "micro_batch": 4, "cuts": 1}
