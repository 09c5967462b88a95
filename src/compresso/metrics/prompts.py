"""What models are asked to write in a report: two dozen prompts of a kind, so that a share of broken texts says
something.

A model with a chat template, or one trained on instructions, is given requests; others are given openings.
"""

OPENINGS = (
    "Once upon a time, a little fox lived at the edge of a quiet forest. One morning",
    "Ben and his sister found an old box under the stairs. When they opened it,",
    "Water turns into ice when",
    "The moon looks bright at night because",
    "To make a cup of tea, first",
    "The three most useful things to take on a long walk are",
    "Dear neighbour, thank you for looking after our garden while we were away. When we came home,",
    "Question: Why do many trees lose their leaves in autumn?\nAnswer:",
    "The old lighthouse had been dark for years, until one evening",
    "A good friend is one who",
    "Bread rises in the oven because",
    "The first thing she noticed about the new town was",
    "Birds fly south in winter because",
    "When the rain stopped at last, the children",
    "In order to learn a new language, it helps to",
    "My grandfather used to tell us about the year when",
    "The library in our street is open every day except",
    "Question: What should you do before you cross a busy road?\nAnswer:",
    "The train was late, so the passengers",
    "Plants need light because",
    "On the last day of the holidays, Anna wrote in her diary:",
    "The recipe is simple. Take two eggs, some flour and",
    "Scientists who study the sea have found that",
    "He looked for his keys everywhere. At last he found them",
)
"""Beginnings that a base model can go on with: stories, facts, instructions, letters, questions."""

REQUESTS = (
    "Tell me a short story about a fox who lives at the edge of a forest.",
    "Why does ice float on water?",
    "How do I make a cup of tea?",
    "Name three useful things to take on a long walk, and say why.",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "Why do many trees lose their leaves in autumn?",
    "What should I do before I cross a busy road?",
    "Explain to a child why the moon looks bright at night.",
    "Give me two tips for learning a new language.",
    "What makes a person a good friend?",
    "Why does bread rise in the oven?",
    "Describe a rainy afternoon in one or two sentences.",
    "How can I fall asleep more easily?",
    "Why do some birds fly south in winter?",
    "Suggest a simple dinner with eggs and potatoes.",
    "What is a library for?",
    "Write two sentences about a train that is late.",
    "How do plants use light?",
    "What is the difference between a lake and a river?",
    "Give an example of a polite way to say no.",
    "Why is it important to drink water?",
    "What do you need to bake a simple cake?",
    "Describe what happens when the sun sets.",
    "How can I find a lost key in my house?",
)
"""What a model that follows instructions is asked."""
