"""The paper's observation: untargeted adversarial examples of an infected model behave like triggered images.

connection       three measurements of the observation, with a benign control; they need the trigger
infection_score  a score that needs only the model and clean images: is the model infected, and what are the targets?
"""
