"""A little text of the kinds that no machine has lying about: stories, facts, conversations.

Written for this project, under its licence.
"""

STORY = """\
The ferry left at six, as it had every morning for forty years, and Marta stood at the rail with
her collar turned up and watched the town grow small. Her father used to say that the island
looked like a sleeping dog from here: the long back of the hill, the lighthouse for an ear, and
the harbour tucked under its chin. She had never been able to see it. She saw roofs, and smoke,
and the white wall of the school where she had learned to read.

"First time across?" asked the man beside her. He had a basket of eggs on his knees, and he held
it as carefully as if it were a child.

"First time alone," she said.

He nodded as though that were the more important thing. For a while they said nothing. The gulls
followed the boat, hanging in the wind without moving their wings, and the engine hummed under the
deck. When the sun came out from behind the clouds, the whole sea turned from grey to green at
once, and somebody's little boy laughed out loud.

"My brother went to the city," the man said at last. "He was going to stay for a month. That was
in the year of the big storm. He has three daughters now, and a shop with his name over the door.
He writes at Christmas. He always asks whether the old pear tree is still standing."

"And is it?"

"No," said the man. "But I have not told him yet." He looked down at his eggs. "I think he knows.
People ask about the things they already know."

Marta thought of the letter in her pocket, which she had read so often that the paper had gone
soft along the folds. She did not need to take it out. There was a room, it said, with a window
over a yard, and work from Monday, if she was not afraid of long hours. She was not afraid of
hours. She was afraid of the window, and of what she might feel when she stood at it in the
evening and saw a yard where the sea should be.

Once upon a time there was a king who could not sleep. He called his doctors, and they gave him
bitter drinks; he called his musicians, and they played until their fingers hurt; but every night
he lay awake and counted the bells. At last an old woman came to the palace with a broom over her
shoulder. "I have come to sweep your room," she said. "A king's room is swept already," said the
guard. "Not under the bed," said the old woman, and she went in. Under the bed she found all the
promises that the king had made and had not kept, lying there like dust. She swept them into a
heap, and it was so high that the king could see it over the edge of his blanket. He began with
the smallest one that same night, and before he had finished it he was asleep.
"""

FACTS = """\
Water boils at one hundred degrees Celsius at sea level, but at a lower temperature in the
mountains, because the pressure of the air is smaller there. This is why pasta takes longer to
cook at high altitude. When water freezes it expands by about nine percent, so that ice floats; if
it sank, lakes would freeze from the bottom up and few fish would survive the winter.

Paris is the capital and largest city of France. It lies on the river Seine and has been a centre
of finance, fashion and the arts since the seventeenth century. London is the capital of England
and of the United Kingdom, Rome is the capital of Italy, Madrid of Spain, Berlin of Germany,
Vienna of Austria, and Lisbon of Portugal. The capital of Japan is Tokyo; that of Australia is not
Sydney, its largest city, but Canberra.

The heart of an adult beats about seventy times a minute and pumps some five litres of blood
through the body in that time. Blood leaves the heart through arteries and returns through veins.
Red blood cells carry oxygen from the lungs to the tissues; white blood cells defend the body
against infection. Regular exercise makes the heart stronger, so that it can do the same work with
fewer beats.

The Roman Empire reached its greatest extent under Trajan, who died in the year 117. Two centuries
later Constantine moved the capital to Byzantium, and in 476 the last emperor of the West was
deposed. In the East the empire went on for almost a thousand years, until the Ottomans took
Constantinople in 1453. Historians disagree about the reasons for the decline: disease, inflation,
civil wars and the pressure of migrating peoples all played a part.

Plants make sugar out of carbon dioxide and water with the energy of sunlight. The process is
called photosynthesis, and it releases the oxygen that animals breathe. In autumn, when there is
less light, many trees stop producing chlorophyll; the green fades, and the yellow and red
pigments that were there all along become visible. Evergreens keep their needles, which lose
little water and are covered with wax.

To bake a simple bread, mix five hundred grams of flour with ten grams of salt, seven grams of dry
yeast and three hundred millilitres of warm water. Knead the dough for ten minutes until it is
smooth and elastic. Cover it and let it rise in a warm place for an hour, or until it has doubled
in size. Shape it into a loaf, let it rest for another half an hour, and bake it at two hundred
and twenty degrees for thirty-five minutes. The bread is done when it sounds hollow if you tap it
underneath.

In 2019 the company reported revenue of 4.2 billion dollars, an increase of 11 percent over the
year before. Operating costs rose by only 3 percent, mainly because of lower prices for energy.
"We are satisfied with these results," said the chief executive, "but the coming year will be
harder." The shares fell by two percent after the announcement, as analysts had expected more.
"""

# Questions and answers; the model's own chat template goes around each pair.
CONVERSATIONS = (
    ("What is the largest planet?", "The largest planet of our solar system is Jupiter. It is so "
     "big that more than a thousand Earths would fit into it."),
    ("Can you explain what a noun is?", "A noun is a word that names a person, a place, a thing or "
     "an idea. In the sentence \"The dog sleeps in the garden\", *dog* and *garden* are nouns."),
    ("Write a short poem about rain.", "Soft on the roof and the window pane,\nall through the "
     "night came the whispering rain.\nIt washed every leaf and it filled every stream,\nand "
     "carried the town away in a dream."),
    ("What is 12 times 8?", "12 times 8 is 96."),
    ("What is the capital of Italy?", "The capital of Italy is Rome. It is also the country's "
     "largest city and is known for its long history and its monuments."),
    ("How do I reverse a list in Python?", "You can use the `reversed` function or a slice:\n\n"
     "```python\nnumbers = [1, 2, 3]\nprint(numbers[::-1])  # [3, 2, 1]\n```\n\nTo reverse the "
     "list in place, call `numbers.reverse()`."),
    ("Give me three tips for better sleep.", "1. Go to bed and get up at the same time every "
     "day.\n2. Keep your bedroom dark, quiet and cool.\n3. Avoid coffee in the afternoon and "
     "bright screens before bed."),
    ("Why is the sky blue?", "Sunlight is a mixture of all colours. When it passes through the "
     "air, small molecules scatter blue light much more than red light, so that blue reaches our "
     "eyes from every part of the sky."),
    ("Translate 'good morning' into French.", "\"Good morning\" in French is \"bonjour\"."),
    ("Who wrote Romeo and Juliet?", "*Romeo and Juliet* was written by William Shakespeare, "
     "probably between 1594 and 1596."),
    ("Summarize the story of Cinderella in one sentence.", "A mistreated girl goes to a ball with "
     "the help of her fairy godmother, loses a glass slipper at midnight, and is found by the "
     "prince, who marries her."),
    ("What should I cook tonight?", "How about a vegetable soup? Chop an onion, two carrots and a "
     "potato, fry them for a few minutes, add a litre of broth and let everything simmer for "
     "twenty minutes. Season it with salt, pepper and fresh herbs."),
)  # fmt: skip
