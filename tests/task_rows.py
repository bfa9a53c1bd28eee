"""Three invented rows per real task in the column shape of its dataset, with the prompt and the answers that the first must give."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """`rows` make one split; `prompt` and `answer` belong to the first; `wrong` is well formed, `malformed` is not."""

    rows: list[dict[str, Any]]
    prompt: str
    answer: str
    wrong: str
    malformed: str = "  "


def lettered(*options: str) -> dict[str, list[str]]:
    return {"label": list("ABCDE"[: len(options)]), "text": list(options)}


def superni(task_name: str, definition: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {
            "task_name": task_name,
            "id": f"{task_name[:8]}-{i}",
            "definition": definition,
            "inputs": inputs,
            "targets": targets,
        }
        for i, (inputs, targets) in enumerate(pairs)
    ]


CASES = {
    "aqua_rat": Case(
        rows=[
            {
                "question": "Two pens cost 6. What does one cost?",
                "options": ["A)1", "B)2", "C)3", "D)4", "E)6"],
                "rationale": "6/2",
                "correct": "C",
            },
            {
                "question": "What is half of 10?",
                "options": ["A)5", "B)6", "C)7", "D)8", "E)9"],
                "rationale": "10/2",
                "correct": "A",
            },
            {
                "question": "What is 1 + 7?",
                "options": ["A)5", "B)6", "C)7", "D)8", "E)9"],
                "rationale": "8",
                "correct": "D",
            },
        ],
        prompt="Question: Two pens cost 6. What does one cost?\nA. 1\nB. 2\nC. 3\nD. 4\nE. 6\nAnswer:",
        answer="C",
        wrong="A",
        malformed="3",
    ),
    "banking77": Case(
        rows=[
            {"text": "Where is the parcel with my new card?\n", "label": 11},
            {"text": "I am ten, may I join?", "label": 1},
            {"text": "The rate abroad was off", "label": 76},
        ],
        prompt="Message: Where is the parcel with my new card?\nIntent:",
        answer="card_arrival",
        wrong="age_limit",
        malformed="card arrival",
    ),
    "gsm8k": Case(
        rows=[
            {
                "question": "Ola has 3 boxes of 4 eggs. How many eggs?",
                "answer": "She has 3*4 = <<3*4=12>>12 eggs.\n#### 12",
            },
            {
                "question": "A farm of 2 fields yields 600 each. Total?",
                "answer": "2*600 = <<2*600=1200>>1200\n#### 1,200",
            },
            {"question": "Ben had 9 nuts and ate 4. How many remain?", "answer": "9-4 = <<9-4=5>>5\n#### 5"},
        ],
        prompt="Question: Ola has 3 boxes of 4 eggs. How many eggs?\nAnswer:",
        answer="She has 3*4 = <<3*4=12>>12 eggs.\n#### 12",
        wrong="She has 3+4 = 7 eggs.\n#### 7",
        malformed="She has 12 eggs.",
    ),
    "news_de_ntrex": Case(
        rows=[
            {"translation": {"de": "Der Rat tagte am Montag.", "en": "The council met on Monday."}},
            {"translation": {"de": "Es regnete.", "en": "It rained."}},
            {"translation": {"de": "Niemand kam.", "en": "Nobody came."}},
        ],
        prompt="Translate German into English.\nGerman: Der Rat tagte am Montag.\nEnglish:",
        answer="The council met on Monday.",
        wrong="Zwölf Boxkämpfer",
    ),
    "commonsense_qa": Case(
        rows=[
            {
                "id": str(i),
                "question": f"Where does one keep {thing}?",
                "question_concept": thing,
                "choices": lettered("shelf", "lake", "cloud", "stove", "nest"),
                "answerKey": key,
            }
            for i, (thing, key) in enumerate((("books", "A"), ("fish", "B"), ("eggs", "E")))
        ],
        prompt="Question: Where does one keep books?\nA. shelf\nB. lake\nC. cloud\nD. stove\nE. nest\nAnswer:",
        answer="A",
        wrong="E",
        malformed="shelf",
    ),
    "superni_task1729": Case(
        rows=superni(
            "task1729_personachat_generate_next",
            "Write the next turn.",
            ("Personality: I sail.\nChat history: -Hello!", "Hi, do you like boats?"),
            ("Personality: I bake.\nChat history: -Hungry?", "I made bread this morning."),
            ("Personality: I run.\nChat history: -Tired?", "After ten miles, yes."),
        ),
        prompt="Definition: Write the next turn.\nInput: Personality: I sail.\nChat history: -Hello!\nOutput:",
        answer="Hi, do you like boats?",
        wrong="My sister paints.",
    ),
    "superglue_copa": Case(
        rows=[
            {
                "premise": "The lamp went out.",
                "choice1": "The room was dark.",
                "choice2": "The cat sang.",
                "question": "effect",
                "idx": 0,
                "label": 0,
            },
            {
                "premise": "He was soaked.",
                "choice1": "He read.",
                "choice2": "It poured.",
                "question": "cause",
                "idx": 1,
                "label": 1,
            },
            {
                "premise": "She won.",
                "choice1": "She cheered.",
                "choice2": "She left early.",
                "question": "effect",
                "idx": 2,
                "label": 0,
            },
        ],
        prompt="Premise: The lamp went out.\nQuestion: What was the effect?\nA. The room was dark.\nB. The cat sang.\nAnswer:",
        answer="A",
        wrong="B",
        malformed="C",
    ),
    "mbpp": Case(
        rows=[
            {
                "task_id": i,
                "text": f"Write a function to add {i} to a number.",
                "code": f"def add{i}(x): \r\n\treturn x + {i}",
                "test_list": [f"assert add{i}(1) == {i + 1}", f"assert add{i}(0) == {i}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for i in (2, 3, 4)
        ],
        prompt="Write a Python program.\nTask: Write a function to add 2 to a number.\nTests:\nassert add2(1) == 3\nassert add2(0) == 2\nProgram:",
        answer="def add2(x):\n\treturn x + 2",
        wrong="print('hello')",
    ),
    "pubmed_qa": Case(
        rows=[
            {
                "pubid": i,
                "question": f"Does drug {i} help?",
                "context": {
                    "contexts": ["We asked 40 people.", "Most felt better."],
                    "labels": ["METHODS", "RESULTS"],
                    "meshes": [],
                },
                "long_answer": "It seems so.",
                "final_decision": decision,
            }
            for i, decision in enumerate(("yes", "no", "maybe"))
        ],
        prompt="Abstract: We asked 40 people.\nMost felt better.\nQuestion: Does drug 0 help?\nAnswer (yes, no or maybe):",
        answer="yes",
        wrong="no",
        malformed="yes, it does",
    ),
    "e2e_nlg": Case(
        rows=[
            {"meaning_representation": "name[The Oak], eatType[pub]", "human_reference": "The Oak is a pub."},
            {
                "meaning_representation": "name[The Oak], eatType[pub]",
                "human_reference": "There is a pub called The Oak.",
            },
            {"meaning_representation": "name[Mira], area[riverside]", "human_reference": "Mira lies by the river."},
        ],
        prompt="Describe the restaurant.\nAttributes: name[The Oak], eatType[pub]\nDescription:",
        answer="The Oak is a pub.",
        wrong="Cheap sushi.",
    ),
    "dbpedia_14": Case(
        rows=[
            {"label": 8, "title": "Lund Nedre", "content": " Lund Nedre is a village of 40 people."},
            {"label": 0, "title": "Norbolt", "content": " Norbolt makes bolts."},
            {"label": 13, "title": "The Long Dusk", "content": " The Long Dusk is a novel."},
        ],
        prompt="Title: Lund Nedre\nText: Lund Nedre is a village of 40 people.\nClass:",
        answer="Village",
        wrong="Written Work",
        malformed="village",
    ),
    "trace_numglue_ds": Case(
        rows=[
            {
                "prompt": "Solve the following math problem.\nQuestion:\nWeight of 2 moles of a gas of 5.5 g per mole\nAnswer:",
                "answer": "11",
            },
            {
                "prompt": "Solve the following math problem.\nQuestion:\nSpeed over 9 km in 2 hours\nAnswer:",
                "answer": "4.5",
            },
            {"prompt": "Solve the following math problem.\nQuestion:\nSides of a cube\nAnswer:", "answer": "6"},
        ],
        prompt="Solve the following math problem.\nQuestion:\nWeight of 2 moles of a gas of 5.5 g per mole\nAnswer:",
        answer="11",
        wrong="11.5",
        malformed="eleven",
    ),
    "svamp": Case(
        rows=[
            {
                "ID": f"chal-{i}",
                "Body": f"Kim had {i} kites.",
                "Question": "She got 2 more. How many now?",
                "Equation": f"( {i}.0 + 2.0 )",
                "Answer": f"{i + 2}.0",
                "Type": "Addition",
                "question_concat": f"Kim had {i} kites. She got 2 more. How many now?",
            }
            for i in (8, 18, 98)
        ],
        prompt="Question: Kim had 8 kites. She got 2 more. How many now?\nAnswer:",
        answer="10",
        wrong="6",
        malformed="ten",
    ),
    "superni_task639": Case(
        rows=superni(
            "task639_multi_woz_user_utterance_generation",
            "Write what was asked.",
            ("The train leaves at nine.", "When does the train leave?"),
            ("It is in the south.", "Where is the museum?"),
            ("You are welcome.", "Thank you very much."),
        ),
        prompt="Definition: Write what was asked.\nInput: The train leaves at nine.\nOutput:",
        answer="When does the train leave?",
        wrong="I need a cheap hotel",
    ),
    "boolq": Case(
        rows=[
            {"question": "is cork wood", "passage": "Cork -- Cork is bark.", "answer": False},
            {"question": "do herons fly", "passage": "Heron -- Herons fly far.", "answer": True},
            {"question": "is tin a metal", "passage": "Tin -- Tin is a metal.", "answer": True},
        ],
        prompt="Cork -- Cork is bark.\nQuestion: is cork wood?\nAnswer (yes or no):",
        answer="no",
        wrong="yes",
        malformed="False",
    ),
    "superni_task002": Case(
        rows=superni(
            "task002_quoref_answer_generation",
            "Answer from the passage.",
            ("Passage: Old Tom met Ida at the pier. \nQuestion: Who met Ida?", "Old Tom."),
            ("Passage: Ida sold nets. \nQuestion: What was sold?", "nets"),
            ("Passage: Tom slept. \nQuestion: Who slept?", "Tom"),
        ),
        prompt="Definition: Answer from the passage.\nInput: Passage: Old Tom met Ida at the pier. \nQuestion: Who met Ida?\nOutput:",
        answer="Old Tom.",
        wrong="the pier",
    ),
    "logiqa": Case(
        rows=[
            {
                "context": f"All {x} are blue.",
                "query": f"What colour is one of the {x}?",
                "options": ["Red", "Blue", "Green", "None"],
                "correct_option": 1,
            }
            for x in ("stones", "birds", "doors")
        ],
        prompt="Passage: All stones are blue.\nQuestion: What colour is one of the stones?\nA. Red\nB. Blue\nC. Green\nD. None\nAnswer:",
        answer="B",
        wrong="D",
        malformed="Blue",
    ),
    "news_commentary_de": Case(
        rows=[
            {"id": "0", "translation": {"de": "Die Zinsen steigen.", "en": "Interest rates are rising."}},
            {"id": "1", "translation": {"de": "Wer zahlt?", "en": "Who pays?"}},
            {"id": "2", "translation": {"de": "Das reicht nicht.", "en": "That is not enough."}},
        ],
        prompt="Translate German into English.\nGerman: Die Zinsen steigen.\nEnglish:",
        answer="Interest rates are rising.",
        wrong="xyz",
    ),
    "cnn_dailymail": Case(
        rows=[
            {
                "article": f"{town} opened a bridge. " + "Crowds came. " * 300,
                "highlights": f"{town} has a bridge .\nMany came .",
                "id": town,
            }
            for town in ("Arlen", "Belmo", "Corda")
        ],
        prompt="Summarise the article.\nArticle: Arlen opened a bridge. "
        + "Crowds came. " * 197
        + "Crowds came.\nSummary:",
        answer="Arlen has a bridge .\nMany came .",
        wrong="Prices fell.",
    ),
    "dialogsum": Case(
        rows=[
            {
                "id": "test_0_1",
                "dialogue": "#Person1#: Tea?\n#Person2#: Please.",
                "summary": "#Person2# takes tea.",
                "topic": "tea",
            },
            {
                "id": "test_0_2",
                "dialogue": "#Person1#: Tea?\n#Person2#: Please.",
                "summary": "Tea is offered and accepted.",
                "topic": "a drink",
            },
            {
                "id": "test_1_1",
                "dialogue": "#Person1#: Bye.\n#Person2#: Bye.",
                "summary": "They part.",
                "topic": "parting",
            },
        ],
        prompt="Summarise the dialogue.\n#Person1#: Tea?\n#Person2#: Please.\nSummary:",
        answer="#Person2# takes tea.",
        wrong="Rain fell all day.",
    ),
    "glue_mnli": Case(
        rows=[
            {"premise": "Six men row.", "hypothesis": "People row.", "label": 0, "idx": 0},
            {"premise": "A dog naps.", "hypothesis": "It is old.", "label": 1, "idx": 1},
            {"premise": "It is noon.", "hypothesis": "It is midnight.", "label": 2, "idx": 2},
        ],
        prompt="Premise: Six men row.\nHypothesis: People row.\nRelation (entailment, neutral or contradiction):",
        answer="entailment",
        wrong="neutral",
        malformed="true",
    ),
    "openbookqa": Case(
        rows=[
            {
                "id": str(i),
                "question_stem": f"What does a {thing} need?",
                "choices": lettered("light", "paint", "noise", "wool"),
                "answerKey": "A",
            }
            for i, thing in enumerate(("fern", "moss", "rose"))
        ],
        prompt="Question: What does a fern need?\nA. light\nB. paint\nC. noise\nD. wool\nAnswer:",
        answer="A",
        wrong="C",
        malformed="light",
    ),
    "trace_fomc": Case(
        rows=[
            {"prompt": f"Choose A, B or C.\nText: Rates may {verb}.\nStance:", "answer": letter}
            for verb, letter in (("fall", "A"), ("rise", "B"), ("stay", "C"))
        ],
        prompt="Choose A, B or C.\nText: Rates may fall.\nStance:",
        answer="A",
        wrong="C",
        malformed="dovish",
    ),
    "trace_c_stance": Case(
        rows=[
            {"prompt": f"判断立场，选择A、B或C。\n文本：{text}\n立场：", "answer": letter}
            for text, letter in (("我同意", "A"), ("我反对", "B"), ("不好说", "C"))
        ],
        prompt="判断立场，选择A、B或C。\n文本：我同意\n立场：",
        answer="A",
        wrong="B",
        malformed="支持",
    ),
}
