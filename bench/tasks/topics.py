"""Further classification data sets, used by studies of soft prompts and of few labels."""

from __future__ import annotations

from peftdyno.bench.task import SplitNames, Task, layout

_ON_TEST = SplitNames(test=("test",))

TASKS = (
    Task(
        name="trec",
        category="topics",
        metric="macro_f1",
        hub_id="trec",
        splits=_ON_TEST,
        instruction=(
            "What does this question ask for? "
            "Reply with one word: abbreviation, entity, description, human, location or number."
        ),
        inputs=("text",),
        target="coarse_label",
        labels=("abbreviation", "entity", "description", "human", "location", "number"),
    ),
    Task(
        name="ag_news",
        category="topics",
        metric="macro_f1",
        hub_id="ag_news",
        splits=_ON_TEST,
        instruction="What is this news about? Reply with one word: world, sports, business or technology.",
        inputs=("text",),
        labels=("world", "sports", "business", "technology"),
    ),
    Task(
        name="dbpedia_14",
        category="topics",
        metric="macro_f1",
        hub_id="dbpedia_14",
        splits=_ON_TEST,
        instruction=(
            "What kind of thing is described here? "
            "Reply with one word: company, school, artist, athlete, politician, "
            "transport, building, nature, village, animal, plant, album, film or writing."
        ),
        inputs=(layout("{title}:{content}"),),
        labels=(
            "company",
            "school",
            "artist",
            "athlete",
            "politician",
            "transport",
            "building",
            "nature",
            "village",
            "animal",
            "plant",
            "album",
            "film",
            "writing",
        ),
    ),
    Task(
        name="snips",
        category="topics",
        metric="macro_f1",
        splits=SplitNames(validation="validation", test=("test",)),
        instruction=(
            "What does the speaker want? "
            "Reply with one of AddToPlaylist, BookRestaurant, GetWeather, PlayMusic, "
            "RateBook, SearchWork or SearchScreening."
        ),
        inputs=("text",),
        labels=(
            "AddToPlaylist",
            "BookRestaurant",
            "GetWeather",
            "PlayMusic",
            "RateBook",
            "SearchWork",
            "SearchScreening",
        ),
    ),
    Task(
        name="yelp_polarity",
        category="topics",
        metric="f1",
        hub_id="yelp_polarity",
        splits=_ON_TEST,
        instruction="Did the customer like the place? Reply with negative or positive.",
        inputs=("text",),
        labels=("negative", "positive"),
    ),
)
