"""Three invented rows per task of the streams O-LoRA, SuperNI and CURLoRA, with the exact prompt of the first.

A task that reads the rows of another one shares its folder under data_dir, and its rows here.
"""

from task_rows import CASES as OWN
from task_rows import Case, superni

SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option.\n"
TOPIC = "What is the topic of the following paragraph? Choose one from the option.\n"
STARS = "Option: very negative, negative, neutral, positive, very positive \n"
RELATION = (
    "Task:NLI\nDataset:{}\n"
    'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n'
)

OLORA = {
    "olora_dbpedia": Case(
        rows=OWN["dbpedia_14"].rows,
        prompt=f"Task:TC\nDataset:dbpedia\n{TOPIC}"
        "Option: Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
        "Natural Place, Village, Animal, Plant, Album, Film, Written Work \n"
        "Title: Lund Nedre\nText:  Lund Nedre is a village of 40 people.\n\nAnswer:",
        answer="Village",
        wrong="Written Work",
        malformed="village",
    ),
    "olora_amazon": Case(
        rows=[
            {"class_index": 2, "review_title": "Leaks", "review_text": "The kettle drips."},
            {"class_index": 5, "review_title": "Bliss", "review_text": "Best spoon of my life."},
            {"class_index": 1, "review_title": "Broke", "review_text": "Gone after a day."},
        ],
        prompt=f"Task:SC\nDataset:amazon\n{SENTIMENT}{STARS}Title: Leaks\nText: The kettle drips.\n\nAnswer:",
        answer="negative",
        wrong="very negative",
        malformed="2",
    ),
    "olora_yahoo": Case(
        rows=[
            {
                "id": i,
                "topic": topic,
                "question_title": f"{thing}?",
                "question_content": f"I mean {thing}.",
                "best_answer": f"All about {thing}.",
            }
            for i, (topic, thing) in enumerate(((5, "rowing"), (0, "proverbs"), (9, "ballots")))
        ],
        prompt=f"Task:TC\nDataset:yahoo\n{TOPIC}"
        "Option: Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, Sports, "
        "Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government \n"
        "Title: rowing?\nQuestion: I mean rowing.\nAnswer: All about rowing.\n\nAnswer:",
        answer="Sports",
        wrong="Society & Culture",
        malformed="sports",
    ),
    "olora_agnews": Case(
        rows=[
            {"label": 4, "title": "Probe lands", "description": "It sent pictures home."},
            {"label": 1, "title": "Talks end", "description": "Both sides went home."},
            {"label": 2, "title": "Cup drawn", "description": "The final ended level."},
        ],
        prompt=f"Task:TC\nDataset:agnews\n{TOPIC}Option: World, Sports, Business, Science or Technology \n"
        "Title: Probe lands\nText: It sent pictures home.\n\nAnswer:",
        answer="Science or Technology",
        wrong="World",
        malformed="Technology",
    ),
    "olora_mnli": Case(
        rows=OWN["glue_mnli"].rows,
        prompt=RELATION.format("MNLI") + "Option: neutral, entailment, contradiction \n"
        "sentence 1: Six men row.\nsentence 2: People row.\nAnswer:",
        answer="entailment",
        wrong="neutral",
        malformed="true",
    ),
    "olora_cb": Case(
        rows=[
            {"premise": "Ann doubts that it froze.", "hypothesis": "it froze", "idx": 0, "label": 1},
            {"premise": "Ann knows that it froze.", "hypothesis": "it froze", "idx": 1, "label": 0},
            {"premise": "Ann asks if it froze.", "hypothesis": "it froze", "idx": 2, "label": 2},
        ],
        prompt=RELATION.format("CB") + "Option: entailment, contradiction, neutral \n"
        "sentence 1: Ann doubts that it froze.\nsentence 2: it froze\nAnswer:",
        answer="contradiction",
        wrong="entailment",
        malformed="no",
    ),
    "olora_wic": Case(
        rows=[
            {"word": "bank", "sentence1": "A bank of sand.", "sentence2": "The bank closed.", "label": 0},
            {"word": "row", "sentence1": "A row of pines.", "sentence2": "Sit in the row.", "label": 1},
            {"word": "pitch", "sentence1": "A high pitch.", "sentence2": "Boil the pitch.", "label": 0},
        ],
        prompt="Task:WiC\nDataset:WiC\nGiven a word and two sentences, whether the word is used with the same sense in both "
        "sentence? Choose one from the option.\nOption: True, False \n"
        "word: bank\nA bank of sand.\nThe bank closed.\nAnswer:",
        answer="False",
        wrong="True",
        malformed="no",
    ),
    "olora_copa": Case(
        rows=OWN["superglue_copa"].rows,
        prompt='Task:COPA\nDataset:COPA\nWhich sentence is the effect of "The lamp went out."? Choose one between A and B.\n'
        "A: The room was dark.\nB: The cat sang.\nAnswer:",
        answer="A",
        wrong="B",
        malformed="C",
    ),
    "olora_qqp": Case(
        rows=[
            {"question1": "How old is Oslo?", "question2": "What is the age of Oslo?", "label": 1, "idx": 0},
            {"question1": "Is tea hot?", "question2": "Is tea cheap?", "label": 0, "idx": 1},
            {"question1": "Why nap?", "question2": "Why do people nap?", "label": 1, "idx": 2},
        ],
        prompt='Task:QQP\nDataset:QQP\nWhether the "first sentence" and the "second sentence" have the same meaning? '
        "Choose one from the option.\nOption: False, True \n"
        "first sentence: How old is Oslo?\nsecond sentence: What is the age of Oslo?\nAnswer:",
        answer="True",
        wrong="False",
        malformed="true",
    ),
    "olora_boolqa": Case(
        rows=[
            {"question": "is cork wood", "passage": "Cork -- Cork is bark.", "idx": 0, "label": 0},
            {"question": "do herons fly", "passage": "Heron -- Herons fly far.", "idx": 1, "label": 1},
            {"question": "is tin a metal", "passage": "Tin -- Tin is a metal.", "idx": 2, "label": 1},
        ],
        prompt="Task:BoolQA\nDataset:BoolQA\nAccording to the following passage, is the question true or false? "
        "Choose one from the option.\nOption: True, False \nquestion: is cork wood\npassage: Cork -- Cork is bark.\nAnswer:",
        answer="False",
        wrong="True",
        malformed="no",
    ),
    "olora_rte": Case(
        rows=[
            {"sentence1": "It rained all of May.", "sentence2": "May was dry.", "label": 1, "idx": 0},
            {"sentence1": "Ida bought a mule.", "sentence2": "Ida owns a mule.", "label": 0, "idx": 1},
            {"sentence1": "The inn is full.", "sentence2": "The inn has a cellar.", "label": 1, "idx": 2},
        ],
        prompt=RELATION.format("RTE") + "Option: contradiction, entailment \n"
        "sentence 1: It rained all of May.\nsentence 2: May was dry.\nAnswer:",
        answer="contradiction",
        wrong="entailment",
        malformed="not_entailment",
    ),
    "olora_imdb": Case(
        rows=[
            {"text": "I left before the end.", "label": 0},
            {"text": "A film to see twice.", "label": 1},
            {"text": "Long, loud, empty.", "label": 0},
        ],
        prompt=f"Task:SC\nDataset:IMDB\n{SENTIMENT}Option: Good, Bad \nI left before the end.\nAnswer:",
        answer="Bad",
        wrong="Good",
        malformed="bad",
    ),
    "olora_yelp": Case(
        rows=[
            {"label": 4, "text": "Best broth in town!\\nGo early."},
            {"label": 2, "text": "Neither here nor there."},
            {"label": 0, "text": "Cold soup, hot temper."},
        ],
        prompt=f"Task:SC\nDataset:yelp\n{SENTIMENT}{STARS}Text: Best broth in town!\\nGo early.\n\nAnswer:",
        answer="very positive",
        wrong="positive",
        malformed="5 stars",
    ),
    "olora_sst2": Case(
        rows=[
            {"sentence": "a warm and patient tale ", "label": 1, "idx": 0},
            {"sentence": "a dull heap of clichés ", "label": 0, "idx": 1},
            {"sentence": "never finds its feet ", "label": 0, "idx": 2},
        ],
        prompt=f"Task:SC\nDataset:SST-2\n{SENTIMENT}Option: Good, Bad \nText: a warm and patient tale \nAnswer:",
        answer="Good",
        wrong="Bad",
        malformed="positive",
    ),
    "olora_multirc": Case(
        rows=[
            {
                "paragraph": "Ida sold nets. Tom slept.",
                "question": "Who slept?",
                "answer": name,
                "idx": {"paragraph": 0, "question": 0, "answer": i},
                "label": label,
            }
            for i, (name, label) in enumerate((("Tom", 1), ("Ida", 0), ("nobody", 0)))
        ],
        prompt="Task:MultiRC\nDataset:MultiRC\nAccording to the following passage and question, is the candidate answer "
        "true or false? Choose one from the option.\nOption: False, True \n"
        "paragraph: Ida sold nets. Tom slept. \nquestion: Who slept?\ncandidate answer: Tom\nAnswer:",
        answer="True",
        wrong="False",
        malformed="Tom",
    ),
}


def sapt(task_name: str, definition: str, *pairs: tuple[str, str], wrong: str) -> Case:
    """A case of SuperNI in SAPT's prompt; `wrong` shares no word with the first answer."""
    return Case(
        rows=superni(task_name, definition, *pairs),
        prompt=f"Definition: {definition}\n\nNow complete the following example -\nInput: {pairs[0][0].strip()}\nOutput:",
        answer=pairs[0][1].strip(),
        wrong=wrong,
    )


def again(name: str) -> Case:
    """The rows of a task that is here with a prompt of its own, in SAPT's prompt."""
    rows = OWN[name].rows
    pairs = [(row["inputs"], row["targets"]) for row in rows]
    return sapt(rows[0]["task_name"], rows[0]["definition"], *pairs, wrong=OWN[name].wrong)


SUPERNI = {
    "superni15_task002": again("superni_task002"),
    "superni15_task639": again("superni_task639"),
    "superni15_task1729": again("superni_task1729"),
    "superni15_task1572": sapt(
        "task1572_samsum_summary",
        "Sum up the chat.",
        (" Ola: I missed the bus, Per: Wait for me", " Per will pick up Ola."),
        ("Ida: Rain again, Tom: Stay in", "It is raining."),
        ("Ann: Lunch?, Bo: At one", "They meet at one."),
        wrong="Cheap hotels everywhere",
    ),
    "superni15_task363": sapt(
        "task363_sst2_polarity_classification",
        "Answer POS or NEG.",
        ("A warm tale .", "POS"),
        ("A dull heap .", "NEG"),
        ("Never finds its feet .", "NEG"),
        wrong="NEG",
    ),
    "superni15_task1290": sapt(
        "task1290_xsum_summarization",
        "Sum up the article.",
        ("The bridge shut at noon.\nNobody was hurt.", "A bridge was closed on Monday."),
        ("Prices rose.", "Inflation is up."),
        ("The team won 3-0.", "An easy victory."),
        wrong="Two dogs barking loudly",
    ),
    "superni15_task181": sapt(
        "task181_outcome_extraction",
        "List the outcomes.",
        ("Pain fell after a week .", "Pain"),
        ("Sleep and mood were better .", "Sleep, mood"),
        ("No trial was done .", "not found"),
        wrong="week",
    ),
    "superni15_task1510": sapt(
        "task1510_evalution_relation_extraction",
        "Write word1 relation word2.",
        ("hot is the opposite of cold", "hot Antonym cold"),
        ("a wheel is part of a cart", "wheel PartOf cart"),
        ("oak is a kind of tree", "oak IsA tree"),
        wrong="wheel PartOf cart",
    ),
    "superni15_task073": sapt(
        "task073_commonsenseqa_answer_generation",
        "Choose the letter.",
        ("Where do fish live?\n(A)lake (B)oven (C)cloud (D)drawer (E)lamp", "A"),
        ("Where is bread baked?\n(A)lake (B)oven (C)cloud (D)drawer (E)lamp", "B"),
        ("What gives light?\n(A)lake (B)oven (C)cloud (D)drawer (E)lamp", "E"),
        wrong="C",
    ),
    "superni15_task1590": sapt(
        "task1590_diplomacy_text_generation",
        "Write the next message.",
        ("['Shall we take Munich?', 'Perhaps.']", "Then let us wait for spring."),
        ("['Are you in?', 'Yes.']", "Good, I move north."),
        ("['Hello!']", "Hello, neighbour."),
        wrong="My fleet sails",
    ),
    "superni15_task748": sapt(
        "task748_glucose_reverse_cause_event_detection",
        "Write A >causes/enables> B.",
        ("story: Tom fell. He cried.\n selected sentence: Tom fell.", "Tom falls >Causes/Enables> he cries"),
        ("story: Ida ran. She won.\n selected sentence: Ida ran.", "Ida runs >Causes/Enables> she wins"),
        ("story: It rained. We left.\n selected sentence: It rained.", "It rains >Causes/Enables> we leave"),
        wrong="nobody slept well",
    ),
    "superni15_task511": sapt(
        "task511_reddit_tifu_long_text_summarization",
        "Sum up the post.",
        ("Text: i wore two left shoes to my wedding.", "wrong shoes, right bride"),
        ("Text: i called my teacher mum.", "embarrassed in class"),
        ("Text: i locked the keys in the car.", "walked home"),
        wrong="nobody noticed anything",
    ),
    "superni15_task591": sapt(
        "task591_sciq_answer_generation",
        "Answer the question.",
        ("What gas do leaves take in?", "carbon dioxide"),
        ("What orbits the earth?", "the moon"),
        ("What do bees make?", "honey"),
        wrong="oxygen",
    ),
    "superni15_task1687": sapt(
        "task195_sentiment140_classification",
        "Say positive or negative.",
        ("@ola what a day! ", "positive"),
        ("my bus is late again", "negative"),
        ("lost my keys", "negative"),
        wrong="negative",
    ),
    "superni15_task875": sapt(
        "task875_emotion_classification",
        "Name the emotion.",
        ("i feel alone tonight", "sadness"),
        ("i feel like singing", "joy"),
        ("i feel cheated", "anger"),
        wrong="joy",
    ),
}

PARAPHRASES = [
    {"sentence1": "Ida sold the boat.", "sentence2": "The boat was sold by Ida.", "label": 1, "idx": 0},
    {"sentence1": "Tom slept well.", "sentence2": "Tom ate well.", "label": 0, "idx": 1},
    {"sentence1": "It cost ten crowns.", "sentence2": "It cost two crowns.", "label": 0, "idx": 2},
]
TWEETS = [
    {"text": text, "date": "Mon", "user": "ola", "sentiment": code, "query": "NO_QUERY"}
    for text, code in (("lost my keys", 0), ("what a day!", 4), ("home at last", 4))
]

CURLORA = {
    "curlora3_mrpc": Case(
        rows=PARAPHRASES,
        prompt="Sentence 1: Ida sold the boat.\nSentence 2: The boat was sold by Ida.\n"
        "Do the sentences mean the same? Answer (yes or no):",
        answer="yes",
        wrong="no",
        malformed="same",
    ),
    "curlora3_published_mrpc": Case(
        rows=PARAPHRASES,
        prompt="Ida sold the boat.\nThe boat was sold by Ida.",
        answer="yes",
        wrong="no",
        malformed="same",
    ),
    "curlora3_sst2": Case(
        rows=OLORA["olora_sst2"].rows,
        prompt="Review: a warm and patient tale\nSentiment (negative or positive):",
        answer="positive",
        wrong="negative",
        malformed="good",
    ),
    "curlora3_published_sst2": Case(
        rows=OLORA["olora_sst2"].rows,
        prompt="a warm and patient tale",
        answer="positive",
        wrong="negative",
        malformed="good",
    ),
    "curlora3_sentiment140": Case(
        rows=TWEETS,
        prompt="Tweet: lost my keys\nSentiment (negative or positive):",
        answer="negative",
        wrong="positive",
        malformed="neutral",
    ),
    "curlora3_published_sentiment140": Case(
        rows=TWEETS, prompt="lost my keys", answer="negative", wrong="positive", malformed="neutral"
    ),
}

CASES = {**OLORA, **SUPERNI, **CURLORA}
