"""The classes of sprites of ``emoji_scenes``: their names, their Twemoji files and their natural colours.

A class is never tinted in a colour that it already has by nature. For example, no caption says "a red apple", because a
natural apple is red. So a named colour always distinguishes a tinted sprite from a natural one.

A colour is natural if it covers a quarter of the sprite or more. Pink counts as red, orange and cream as yellow. White,
grey, black and brown count as no colour. ``tests/test_worlds.py`` measures this rule on the pixels of every class.

The classes after the first sixteen match no other class with 0.8 or more by the detector's score
(``evaluation.emoji.detector``), in any tint, so that the detector and a small tokenizer can tell them apart. The test
measures this, too.
"""

from typing import NamedTuple

import emoji

COLOURS = {
    "red": (214, 32, 40),
    "yellow": (246, 196, 20),
    "green": (44, 152, 56),
    "blue": (36, 92, 214),
    "purple": (138, 52, 176),
}


class SpriteClass(NamedTuple):
    """A class of sprites: its name, the plural, the name of its emoji, and the named colours that it has by nature."""

    name: str
    plural: str
    emoji: str
    natural: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of its Twemoji file: the code points in hexadecimal, without the variation selector."""
        return "-".join(f"{ord(sign):x}" for sign in emoji.emojize(self.emoji) if sign != "\ufe0f")

    @property
    def tints(self) -> tuple[str, ...]:
        return tuple(colour for colour in COLOURS if colour not in self.natural)


# All classes by name. The order matters: the standard world has the first sixteen, the long-tailed world ranks all.
SPRITES = {
    entry.name: entry
    for entry in (
        SpriteClass("cat", "cats", ":cat_face:", ("yellow",)),
        SpriteClass("dog", "dogs", ":dog_face:", ()),
        SpriteClass("frog", "frogs", ":frog:", ("green",)),
        SpriteClass("pig", "pigs", ":pig_face:", ("red",)),
        SpriteClass("fish", "fish", ":fish:", ("blue",)),
        SpriteClass("octopus", "octopuses", ":octopus:", ("purple",)),
        SpriteClass("butterfly", "butterflies", ":butterfly:", ("blue",)),
        SpriteClass("car", "cars", ":automobile:", ("red",)),
        SpriteClass("apple", "apples", ":red_apple:", ("red",)),
        SpriteClass("mushroom", "mushrooms", ":mushroom:", ("red",)),
        SpriteClass("tree", "trees", ":deciduous_tree:", ("green",)),
        SpriteClass("house", "houses", ":house:", ("yellow",)),
        SpriteClass("star", "stars", ":star:", ("yellow",)),
        SpriteClass("heart", "hearts", ":red_heart:", ("red",)),
        SpriteClass("ball", "balls", ":soccer_ball:", ()),
        SpriteClass("cup", "cups", ":hot_beverage:", ()),
        # The rest of the head of the long-tailed world: 8 classes.
        SpriteClass("rabbit", "rabbits", ":rabbit_face:", ()),
        SpriteClass("airplane", "airplanes", ":airplane:", ("blue",)),
        SpriteClass("moon", "moons", ":crescent_moon:", ("yellow",)),
        SpriteClass("turtle", "turtles", ":turtle:", ("green",)),
        SpriteClass("flag", "flags", ":triangular_flag:", ("red",)),
        SpriteClass("duck", "ducks", ":duck:", ()),
        SpriteClass("clock", "clocks", ":alarm_clock:", ("red",)),
        SpriteClass("cherry", "cherries", ":cherries:", ("red", "green")),
        # Its tail: 28 classes.
        SpriteClass("sailboat", "sailboats", ":sailboat:", ("yellow", "blue")),
        SpriteClass("bee", "bees", ":honeybee:", ()),
        SpriteClass("trophy", "trophies", ":trophy:", ("yellow",)),
        SpriteClass("snake", "snakes", ":snake:", ("green",)),
        SpriteClass("church", "churches", ":church:", ("yellow",)),
        SpriteClass("lion", "lions", ":lion:", ("yellow",)),
        SpriteClass("boot", "boots", ":woman’s_boot:", ()),
        SpriteClass("palm", "palms", ":palm_tree:", ("green",)),
        SpriteClass("spider", "spiders", ":spider:", ()),
        SpriteClass("magnet", "magnets", ":magnet:", ("red",)),
        SpriteClass("panda", "pandas", ":panda:", ()),
        SpriteClass("tractor", "tractors", ":tractor:", ("green",)),
        SpriteClass("medal", "medals", ":sports_medal:", ("yellow", "blue")),
        SpriteClass("dinosaur", "dinosaurs", ":T-Rex:", ("green",)),
        SpriteClass("kite", "kites", ":kite:", ("blue",)),
        SpriteClass("avocado", "avocados", ":avocado:", ("green",)),
        SpriteClass("sword", "swords", ":dagger:", ()),
        SpriteClass("flamingo", "flamingos", ":flamingo:", ("red",)),
        SpriteClass("rainbow", "rainbows", ":rainbow:", ("yellow",)),
        SpriteClass("ghost", "ghosts", ":ghost:", ()),
        SpriteClass("helicopter", "helicopters", ":helicopter:", ("yellow",)),
        SpriteClass("shrimp", "shrimps", ":shrimp:", ("red",)),
        SpriteClass("ring", "rings", ":ring:", ("blue",)),
        SpriteClass("parachute", "parachutes", ":parachute:", ("red",)),
        SpriteClass("axe", "axes", ":axe:", ("yellow",)),
        SpriteClass("bone", "bones", ":bone:", ("yellow",)),
        SpriteClass("telescope", "telescopes", ":telescope:", ("red",)),
        SpriteClass("bow", "bows", ":bow_and_arrow:", ()),
        # Absent from its training: 12 classes.
        SpriteClass("giraffe", "giraffes", ":giraffe:", ("yellow",)),
        SpriteClass("guitar", "guitars", ":guitar:", ("red",)),
        SpriteClass("crab", "crabs", ":crab:", ("red",)),
        SpriteClass("rocket", "rockets", ":rocket:", ("red", "blue")),
        SpriteClass("bicycle", "bicycles", ":bicycle:", ("red",)),
        SpriteClass("penguin", "penguins", ":penguin:", ()),
        SpriteClass("sun", "suns", ":sun:", ("yellow",)),
        SpriteClass("anchor", "anchors", ":anchor:", ("blue",)),
        SpriteClass("pizza", "pizzas", ":pizza:", ("red", "yellow")),
        SpriteClass("snowman", "snowmen", ":snowman_without_snow:", ()),
        SpriteClass("castle", "castles", ":castle:", ()),
        SpriteClass("banana", "bananas", ":banana:", ("yellow",)),
    )
}
