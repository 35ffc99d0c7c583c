"""Prompts that the bundled model continues with readable English.

For at least 64 greedy tokens the best one leads the second by a wide margin (the model card beside the weights has the
figure, tests/unit/test_bundled_model.py the check): two correct engines cannot disagree on these by rounding.
"""

DEMO_PROMPTS: tuple[str, ...] = (
    "In the beginning",
    "The LORD is my shepherd",
    "To every thing there is",
    "Blessed are the meek",
    "Though I speak with the tongues of men",
    "When I was a child",
    "Charity suffereth long",
    "Consider the lilies of the field",
    "I will lift up mine eyes",
    "Make a joyful noise",
    "Vanity of vanities",
    "One generation passeth away",
    "Ye are the salt of the earth",
    "Our Father which art in heaven",
    "Lay not up for yourselves treasures",
    "A certain man had two sons",
    "Ask, and it shall be given you",
    "Comfort ye, comfort ye my people",
    "Every valley shall be exalted",
    "Now the serpent was more subtil",
    "Blessed is the man that walketh not",
    "When I consider thy heavens",
    "There was a man sent from God",
    "And I saw a new heaven",
)
