"""The paper's observation, measured: untargeted adversarial examples of an infected model behave like triggered images.

connection       three measurements of it, with the benign control, by whoever knows the trigger
infection_score  a defender's: from the model and clean images alone, is it infected, and towards which labels?
"""
