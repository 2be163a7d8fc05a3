"""How fast is a step, and how near to float64?"""
