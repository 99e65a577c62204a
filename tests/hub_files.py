"""
Tiny copies of 22 benchmarks' data sets, in the schemas of the hub, written as folders as `hf download` leaves them, and what a reader must make of
them: EXPECTED[benchmark][profile] = [(prompt, gold)] for the rows that the benchmark uses, in their order.

Columns, types, prompts and traps are as of the project's notes on hub data (lmms-eval in summer 2026, cambrian and PIVOT as published); nothing was
tried against the live hub. Profile "paper" is Cambrian's evaluation, as PIVOT used it, and "lmms" is lmms-eval. Every prompt is written by hand here,
only its last line may be one of the named ones, so that a test compares two things of different origin. Pictures are coloured blocks.
"""
import io
import os
import zlib

import datasets
import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value

datasets.disable_progress_bars()
TEXT, INTEGER, PICTURE = Value("string"), Value("int64"), Image()
ODD = {  # benchmark -> (row, what its file is): the pictures that must be converted to RGB, or turned, after opening
    "ai2d": (1, "RGBA"), "chartqa": (2, "P"), "docvqa": (0, "L"), "ocrbench": (1, "CMYK"), "realworldqa": (3, "turned")}


def picture(name, kind="RGB"):
    """The cell of a picture of 8 x 8 blocks: each name has its own. turned: lies on its side, and an EXIF tag says so"""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(blocks).resize(tuple(rng.integers(32, 65, 2).tolist()), PIL.Image.Resampling.NEAREST)
    form, extra = ("JPEG" if kind in ("CMYK", "turned") else "PNG"), {}
    if kind == "P":
        image = image.quantize(16)
    elif kind == "turned":
        image, extra = image.transpose(PIL.Image.Transpose.ROTATE_90), {"exif": PIL.Image.Exif()}
        extra["exif"][0x0112] = 6  # to be turned clockwise
    elif kind == "RGBA":
        image.putalpha(image.getchannel("R"))
    else:
        image = image.convert(kind)
    out = io.BytesIO()
    image.save(out, form, **extra)
    return {"bytes": out.getvalue(), "path": name.replace("/", "_") + {"JPEG": ".jpg", "PNG": ".png"}[form]}


def table(features, *rows):
    """Columns and rows in the order of the columns -> a Dataset"""
    return Dataset.from_list([dict(zip(features, row, strict=True)) for row in rows], features=Features(features))


def write(folder, only=None):
    """All sets, or those that are named ("ORG/NAME"), as FOLDER/ORG/NAME/{README.md, *.parquet}"""
    for name in only or SETS:
        base, card = os.path.join(folder, name), ["---", "configs:"]
        for (config, split), rows in SETS[name]().items():
            part = "data" if config == "default" else config
            os.makedirs(os.path.join(base, part), exist_ok=True)
            rows.to_parquet(os.path.join(base, part, f"{split}-00000-of-00001.parquet"))
            card += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {part}/{split}-*"]
        with open(os.path.join(base, "README.md"), "w") as file:
            file.write("\n".join([*card, "---", f"# {name}", ""]))


# ---- questions with options ------------------------------------------------------------------------------------------------


def mmbench(column, front):
    """Circular: question i with its options rolled by k has the index k * 1e6 + i. The two copies name `column` and order columns differently"""
    questions = (  # index, hint, question, options, the right one, category, broader category
        (241, "The arrow on the map points up.", "Which way does the arrow point?", ["north", "south"], 0, "spatial_relationship",
         "relation_reasoning"),
        (252, "nan", "How warm is the drink?", ["cold", "warm", "hot"], 0, "physical_property_reasoning", "attribute_reasoning"),
        (263, "nan", "Which shape is in the middle?", ["circle", "square", "star", "cross"], 2, "object_localization", "finegrained_perception"))
    rows = []
    for k in range(4):
        for index, hint, question, options, right, category, broader in questions:
            if k < len(options):
                rolled = options[k:] + options[:k]
                letters = dict(zip("ABCD", rolled + ["nan"] * (4 - len(rolled))))
                rows.append({"index": k * 1_000_000 + index, "question": question, "hint": hint, **letters, "category": category,
                             "answer": "ABCD"[rolled.index(options[right])], "image": picture(f"mmbench/{index}"), "source": "reasoning",
                             column: broader, "comment": "nan", "split": "dev"})
    features = {**dict.fromkeys([*front, "category", "image", "source", column, "comment", "split"], TEXT), "index": INTEGER, "image": PICTURE}
    return table(features, *([row[name] for name in features] for row in rows))


def mmbench_en():
    return {("default", "dev"): mmbench("l2-category", ["index", "question", "hint", "A", "B", "C", "D", "answer"])}


def mmbench_new():
    return {("en", "dev"): mmbench("L2-category", ["index", "question", "hint", "answer", "A", "B", "C", "D"])}


def seed():
    features = {"answer": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT, "choice_d": TEXT, "data_id": TEXT, "data_type": TEXT,
                "question": TEXT, "question_id": TEXT, "question_type_id": Value("int16"), "image": List(PICTURE), "segment": List(INTEGER)}
    one = lambda name: [picture(f"seed/{name}")]
    return {("default", "test"): table(
        features,
        ("A", "One", "Two", "Three", "Four", "1454426_2591111986", "image", "How many towels are in the picture?", "101669", 5, one(1), None),
        ("C", "In the sink", "On the floor", "On the wall", "Under the bed", "1454426_2591111986", "image", "Where is the mirror?", "101670", 4,
         one(1), None),
        ("B", "Opens a door", "Pours water", "Sits down", "Cuts bread", "P01_11", "video", "What does the person do?", "v10", 10,
         [picture(f"seed/frame {i}") for i in range(3)], [36, 39]),
        ("D", "Red", "Green", "Blue", "White", "1501425_2591", "image", "What colour is the car?", "101671", 3, one(2), None),
        ("B", "A street", "A beach", "A kitchen", "A forest", "1501425_2592", "image", "What is the scene?", "101672", 1, one(3), None),
        ("A", "Exit", "Enter", "Open", "Stop", "1501425_2593", "image", "What is written on the sign?", "101673", 9, one(4), None))}


def scienceqa():
    features = {"image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": Value("int8"),
                **dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT)}

    def row(number, question, choices, answer, hint=""):
        return (picture(f"scienceqa/{number}"), question, choices, answer, hint, "closed choice", "grade4", "natural science", "physics",
                "Materials", "Compare properties of objects", "A lecture.", "A solution.")
    return {("ScienceQA-IMG", "test"): table(
        features,
        row(1, "Which of these states is farthest north?", ["Ohio", "Maine", "Texas", "Utah"], 1),
        row(2, "Is the spoon an insulator?", ["yes", "no"], 1, "The spoon in the picture is made of steel."),
        row(2, "Which property do these three objects have in common?", ["hard", "soft", "salty"], 0, "Select the better answer."),
        row(3, "What can the two students test?", ["the size of the seed", "the speed of the ball"], 1,
            "Ada rolled a ball down a ramp.\nFigure: a ball on a ramp."),
        row(4, "Which pair is closer together?", ["Pair 1.", "Pair 2.", "Both the same."], 2),
        row(5, "What is the name of the colony shown?", ["New York", "Virginia", "Delaware", "Maryland"], 3))}


def mmmu():
    pictures = [f"image_{i}" for i in range(1, 8)]
    features = {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT, **dict.fromkeys(pictures, PICTURE), "img_type": TEXT,
                "answer": TEXT, "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT}

    def row(name, question, options, answer, n_pictures=1):
        images = [picture(f"mmmu/{name} {i}") if i < n_pictures else None for i in range(7)]
        kind = "open" if options == "[]" else "multiple-choice"
        return (f"validation_{name}", question, options, "", *images, "['Diagrams']", answer, "Easy", kind, "General")
    return {("default", "validation"): table(
        features,
        row("Art_1", "Which style does the work in <image 1> show?", "['Cubism', 'Baroque', 'Gothic', 'Realism', 'Pop art']", "E"),
        row("Math_2", "<image 1> What is the length of the side x?", "[]", "5.66"),
        row("Physics_3", "Which law explains what happens in <image 1>?", """["Hooke's law", "Ohm's law", 'The law of "least action"']""", "B"),
        row("Biology_4", "Compare <image 1> with <image 2>. Which cell is older?", "['The first', 'The second', 'Neither']", "A", 2),
        row("Finance_5", "How much does the stock in <image 1> cost?", "[]", "['$6', 'six dollars']"),
        row("Biology_6", "Which of these is a leaf?", "['<image 1>', '<image 2>', '<image 3>']", "C", 3),
        row("Design_7", "<image 1> has an arrow. Where does the arrow of <image 1> point?", "['Left', 'Right']", "B"))}


def mathvista():
    metadata = {**dict.fromkeys(("category", "context", "grade"), TEXT), "img_height": INTEGER, "img_width": INTEGER, "language": TEXT,
                "skills": List(TEXT), "source": TEXT, "split": TEXT, "task": TEXT}
    features = {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": PICTURE, "choices": List(TEXT), "unit": TEXT,
                "precision": Value("float64"), "answer": TEXT, "question_type": TEXT, "answer_type": TEXT, "metadata": metadata, "query": TEXT}

    def row(pid, question, answer, answer_type, query, choices=None, precision=None, unit=None):
        about = {"category": "general-vqa", "context": "synthetic scene", "grade": "daily life", "img_height": 48, "img_width": 48,
                 "language": "english", "skills": ["numeric commonsense", "statistical reasoning"], "source": "CLEVR-Math", "split": "testmini",
                 "task": "figure question answering"}
        return (str(pid), question, f"images/{pid}.jpg", picture(f"mathvista/{pid}"), choices, unit, precision, answer,
                "multi_choice" if choices else "free_form", answer_type, about, query)
    return {("default", "testmini"): table(
        features,
        row(1, "How far does the spring stretch?", "1.2", "float",
            "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, "
            "e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How far does the spring stretch?", precision=1.),
        row(2, "What fraction of the shape is blue?", "8/11", "text",
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
            "Question: What fraction of the shape is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6/11\n(D) 3/5", ["3/11", "8/11", "6/11", "3/5"]),
        row(3, "Subtract all red cubes. How many objects are left?", "6", "integer",
            "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\n"
            "Question: Subtract all red cubes. How many objects are left?"),
        row(4, "Between which two years does the line peak?", "[2007, 2008]", "list",
            "Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], "
            "at the end.\nQuestion: Between which two years does the line peak?"),
        row(5, "Is the green curve the highest?", "No", "text",
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
            "Question: Is the green curve the highest?\nChoices:\n(A) No\n(B) Yes", ["No", "Yes"]),
        row(6, "How much do the two sweets cost?", "1.45", "float",
            "Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, "
            "e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How much do the two sweets cost? (Unit: $)", precision=2., unit="$"))}


def ai2d():
    return {("default", "test"): table(
        {"question": TEXT, "options": List(TEXT), "answer": TEXT, "image": PICTURE},
        ("Which letter marks the root?", ["a", "b", "c", "d"], "2", picture("ai2d/1")),
        ("What do mice eat in this food web?", ["grass", "owls", "snakes", "foxes"], "0", picture("ai2d/2", "RGBA")),
        ("What would happen if the owls died out?", ["more mice", "fewer mice", "no grass", "nothing"], "0", picture("ai2d/2")),
        ("How many moons does the diagram show?", ["1", "2", "4", "3"], "3", picture("ai2d/3")),
        ("What stage follows the egg?", ["adult", "larva", "pupa", "none of the above"], "1", picture("ai2d/4")),
        ("Which part absorbs water?", ["leaf", "stem", "root", "flower"], "2", picture("ai2d/1")))}


def mmvp():
    return {("default", "train"): table(
        {"Index": INTEGER, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT, "image": PICTURE},
        (1, "Are the wings spread or folded?", "(a) Spread (b) Folded", "(a)", picture("mmvp/1")),
        (2, "Are the wings spread or folded?", "(a) Spread (b) Folded", "(b)", picture("mmvp/2")),
        (3, "Is the dog facing left or right?", "(a) Left (b) Right", "(b)", picture("mmvp/3")),
        (4, "Is the dog facing left or right?", "(a) Left (b) Right", "(a)", picture("mmvp/4")),
        (5, "Does the cup have a handle?", "(a) Yes (b) No", "(b)", picture("mmvp/5")),
        (6, "Does the cup have a handle?", "(a) Yes (b) No", "(a)", picture("mmvp/6")))}


def realworldqa():
    letter = "\nPlease answer directly with only the letter of the correct option and nothing else."
    word = "\nPlease answer directly with a single word or number."
    return {("default", "test"): table(
        {"image": PICTURE, "question": TEXT, "answer": TEXT, "image_path": TEXT},
        (picture("realworldqa/0"), "Where does the road lead?\n\nA. To the left.\nB. Straight on.\nC. To the right." + letter, "B", "0.webp"),
        (picture("realworldqa/1"), "How many cars are parked on the left?" + word, "3", "1.webp"),
        (picture("realworldqa/2"), "Is the traffic light red?" + word, "No", "2.webp"),
        (picture("realworldqa/3", "turned"), "Which object is taller?\n\nA. The tree\nB. The house" + letter, "A", "3.webp"),
        (picture("realworldqa/4"), "What is the speed limit?" + word, "50", "4.webp"),
        (picture("realworldqa/5"), "Can a truck pass under the bridge?" + word, "Yes", "5.webp"))}


def cvbench():
    features = {"idx": INTEGER, "type": TEXT, "task": TEXT, "image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": TEXT, "prompt": TEXT,
                "filename": TEXT, "source": TEXT, "source_dataset": TEXT, "source_filename": TEXT, "target_class": TEXT, "target_size": INTEGER,
                "bbox": List(List(Value("float64")))}

    def row(idx, kind, task, source, question, choices, answer):
        prompt = question + " Select from the following choices.\n" + "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", choices))
        return (idx, kind, task, picture(f"cvbench/{idx}"), question, choices, answer, prompt, f"img/{kind}/{task.lower()}/{idx}.png", source,
                source, f"{idx}.jpg", None, None, None if kind == "2D" else [[1., 2., 3., 4.], [5., 6., 7., 8.]])
    return {("2D", "test"): table(
                features,
                row(0, "2D", "Count", "ADE20K", "How many lamps are in the image?", ["3", "2", "1", "0"], "(C)"),
                row(1, "2D", "Relation", "ADE20K", "Where is the bed with respect to the lamp?", ["left", "right"], "(A)"),
                row(2, "2D", "Count", "COCO", "How many dogs are in the image?", ["0", "1", "2", "3", "4"], "(E)"),
                row(3, "2D", "Relation", "COCO", "Where is the cat with respect to the sofa?", ["above", "below"], "(B)"),
                row(4, "2D", "Count", "COCO", "How many kites are in the image?", ["5", "6", "7", "8"], "(D)"),
                row(5, "2D", "Relation", "ADE20K", "Where is the door with respect to the desk?", ["left", "right"], "(B)")),
            ("3D", "test"): table(
                features,
                row(1438, "3D", "Depth", "Omni3D", "Which object is closer to the camera, the table (red box) or the chair (blue box)?",
                    ["table", "chair"], "(A)"),
                row(1439, "3D", "Depth", "Omni3D", "Which object is closer to the camera, the lamp (red box) or the bed (blue box)?",
                    ["lamp", "bed"], "(B)"),
                row(1440, "3D", "Distance", "Omni3D", "Which object is closer to the sink (red box), the door (blue box) or the window (green box)?",
                    ["door", "window"], "(B)"),
                row(1441, "3D", "Distance", "Omni3D", "Which object is closer to the car (red box), the bus (blue box) or the van (green box)?",
                    ["bus", "van"], "(A)"))}


def blink():
    """Six tasks are about one picture, eight about several. (Cambrian runs these six only.)"""
    pictures = ["image_1", "image_2", "image_3", "image_4"]
    features = {"idx": TEXT, "question": TEXT, "sub_task": TEXT, **dict.fromkeys(pictures, PICTURE), "choices": List(TEXT), "answer": TEXT,
                "prompt": TEXT, "explanation": TEXT}

    def row(task, number, question, choices, answer, n_pictures=1):
        prompt = question + "\nSelect from the following choices.\n" + "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
        images = [picture(f"blink/{task} {number} {i}") if i < n_pictures else None for i in range(4)]
        return (f"val_{task}_{number}", question, task, *images, choices, answer, prompt, "")
    several = {"Art_Style": 3, "Forensic_Detection": 4, "Functional_Correspondence": 2, "Jigsaw": 3, "Multi-view_Reasoning": 2,
               "Semantic_Correspondence": 2, "Visual_Correspondence": 2, "Visual_Similarity": 3}
    tasks = {task: [(1, "Which picture fits the first one?", ["the second image", "the third image"], "(A)", n_pictures),
                    (2, "Do the pictures show the same thing?", ["yes", "no"], "(B)", n_pictures)] for task, n_pictures in several.items()}
    tasks["Counting"] = [(1, "How many blue floats are there?", ["0", "3", "2", "1"], "(D)"),
                         (2, "How many birds are flying?", ["4", "5", "6", "7"], "(A)")]
    tasks["IQ_Test"] = [(1, "Which figure comes next?", ["picture A", "picture B", "picture C", "picture D"], "(C)"),
                        (2, "Which piece is missing?", ["picture A", "picture B", "picture C", "picture D"], "(B)")]
    tasks["Object_Localization"] = [(1, "Which box is around the bicycle?", ["Box A", "Box B"], "(A)"),
                                    (2, "Which box is around the cup?", ["Box A", "Box B"], "(B)")]
    tasks["Relative_Depth"] = [(1, "Which point is closer to the camera?", ["A is closer", "B is closer"], "(B)"),
                               (2, "Which point is farther from the camera?", ["A is farther", "B is farther"], "(A)")]
    tasks["Relative_Reflectance"] = [(1, "Which point is darker?", ["A is darker", "B is darker", "About the same"], "(C)"),
                                     (2, "Which point is brighter?", ["A is brighter", "B is brighter", "About the same"], "(A)")]
    tasks["Spatial_Relation"] = [(1, "Is the car beneath the cat?", ["yes", "no"], "(A)"), (2, "Is the bench behind the boat?", ["yes", "no"], "(B)")]
    return {(task, "val"): table(features, *(row(task, *each) for each in tasks[task])) for task in sorted(tasks)}


# ---- questions with words as answers ------------------------------------------------------------------------------------------


def mme():
    """The two questions about a picture are not neighbours"""
    features = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT}

    def row(category, number, question, answer):
        return (f"{category}/{number:04}.png", picture(f"mme/{category} {number}"), question + " Please answer yes or no.", answer, category)
    return {("default", "test"): table(
        features,
        row("existence", 6, "Is there a dog in this image?", "Yes"),
        row("count", 7, "Are there three apples in this image?", "No"),
        row("OCR", 1, 'Does the sign say "open"?', "Yes"),
        row("code_reasoning", 20, "Does the program print 5?", "No"),
        row("existence", 7, "Is there a tree in this image?", "Yes"),
        row("text_translation", 3, 'Does the text mean "quiet sea"?', "No"),
        row("count", 7, "Are there two apples in this image?", "Yes"),
        row("existence", 6, "Is there a fridge in this image?", "No"),
        row("text_translation", 3, 'Does the text mean "tall tower"?', "Yes"),
        row("OCR", 1, 'Does the sign say "closed"?', "No"),
        row("code_reasoning", 20, "Does the program print 8?", "Yes"),
        row("existence", 7, "Is there a boat in this image?", "No"))}


def gqa():
    """Pictures lie in a set of their own, in another order, and one of them is not asked about"""
    notes = List({"objectId": TEXT, "value": TEXT})
    features = {"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT, "isBalanced": Value("bool"),
                "groups": {"global": TEXT, "local": TEXT}, "entailed": TEXT, "equivalent": TEXT,
                "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT},
                "annotations": {"question": notes, "answer": notes, "fullAnswer": notes},
                "semantic": List({"operation": TEXT, "argument": TEXT, "dependencies": List(Value("int32"))}), "semanticStr": TEXT}

    def row(number, image, question, answer):
        note = [{"objectId": "1231798", "value": "0"}]
        return (str(number), image, question, answer, f"It is {answer}.", True, {"global": None, "local": "10q-chair"}, f"['{number}']",
                f"['{number}']", {"structural": "query", "semantic": "attr", "detailed": "chooseAttr"},
                {"question": note, "answer": note, "fullAnswer": note},
                [{"operation": "select", "argument": "chair (1231798)", "dependencies": []}], "select: chair (1231798)->query: name [0]")
    return {("testdev_balanced_instructions", "testdev"): table(
                features,
                row(201307251, "n161313", "Is it overcast?", "no"),
                row(201640614, "n235859", "Who is wearing the dress?", "woman"),
                row(202225914, "n336443", "Are the napkin and the cup the same colour?", "yes"),
                row(201307252, "n161313", "What is in front of the house?", "fence"),
                row(201640615, "n235859", "On which side is the chair?", "left"),
                row(202225915, "n336443", "What kind of furniture is it?", "coffee table")),
            ("testdev_balanced_images", "testdev"): table(
                {"id": TEXT, "image": PICTURE}, *((name, picture(f"gqa/{name}")) for name in ("n336443", "n161313", "n99999", "n235859")))}


def chartqa():
    return {("default", "test"): table(
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
        ("human_test", "What is the value of the tallest bar?", "57", picture("chartqa/1")),
        ("human_test", "Is the blue line above the red one in 2010?", "Yes", picture("chartqa/1")),
        ("human_test", "What share of people chose tea?", "25%", picture("chartqa/2", "P")),
        ("human_test", "How many bars are below ten?", "0", picture("chartqa/2")),
        ("augmented_test", "In what year did sales peak?", "2014", picture("chartqa/3")),
        ("augmented_test", "What was the rate in 2001?", "0.34", picture("chartqa/3")))}


def ocrbench():
    return {("default", "test"): table(
        {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": List(TEXT), "image": PICTURE},
        ("IIIT5K", "what is written in the image?", "Regular Text Recognition", ["CENTRE"], picture("ocrbench/1")),
        ("ORAND", "what is the number in the image?", "Digit String Recognition", ["40982"], picture("ocrbench/2", "CMYK")),
        ("TextVQA", "what brand is the watch?", "Scene Text-centric VQA", ["casio", "g shock"], picture("ocrbench/3")),
        ("DocVQA", "When was the letter sent?", "Doc-oriented VQA", ["March 3, 1998"], picture("ocrbench/4")),
        ("SROIE", "what is the total amount? Answer this question using the text in the image directly.", "Key Information Extraction", ["12.50"],
         picture("ocrbench/5")),
        ("HME100k", "Please write out the expression of the formula in the image using LaTeX format.",
         "Handwritten Mathematical Expression Recognition", [r"\frac { 1 } { 2 } X + y"], picture("ocrbench/6")))}


def textvqa():
    features = {"image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": List(TEXT), "image": PICTURE,
                "image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": TEXT, "flickr_300k_url": TEXT,
                "answers": List(TEXT), "image_classes": List(TEXT), "set_name": TEXT, "ocr_tokens": List(TEXT)}

    def row(number, image, question, answers, tokens):
        return (image, number, question, question.rstrip("?").lower().split(), picture(f"textvqa/{image}"), 1024, 681,
                f"https://example.org/{image}.jpg", f"https://example.org/{image}_z.jpg", answers, ["Mobile phone", "Person"], "val", tokens)
    return {("default", "validation"): table(
        features,
        row(34602, "003a8ae2ef43b901", "what is the brand of this camera?", ["dakota"] * 7 + ["dakota digital"] * 2 + ["clos culombu"],
            ["DAKOTA", "DIGITAL"]),
        row(34603, "003a8ae2ef43b901", "Is this a shop in New York?", ["yes"] * 10, ["DAKOTA", "DIGITAL"]),
        row(34604, "00c9fa6db3ea4c0f", "what number is on the player's shirt?", ["22"] * 9 + ["22."], ["22"]),
        row(34605, "00d8a7e2b9d1f3aa", "what does the white sign say?", ["unanswerable"] * 4 + ["stop", "no stopping"] * 3, []),
        row(34606, "00d8a7e2b9d1f3aa", "who is the author of the book?", ["jo mill"] * 8 + ["mill", "jo"], ["Jo", "Mill,", "2nd", "ed."]),
        row(34607, "00e1b2c3d4e5f607", "what time is it on the clock?", ["5:41", "5:40"] * 5, ["XII", "VI"]))}


def docvqa():
    features = {"questionId": TEXT, "question": TEXT, "question_types": List(TEXT), "image": PICTURE, "docId": INTEGER, "ucsf_document_id": TEXT,
                "ucsf_document_page_no": TEXT, "answers": List(TEXT), "data_split": TEXT}

    def row(number, doc, question, answers, kind="RGB"):
        return (str(number), question, ["handwritten", "form"], picture(f"docvqa/{doc}", kind), doc, "pybv0228", "81", answers, "val")
    return {("DocVQA", "validation"): table(
        features,
        row(49153, 14465, "What is the actual value per 1000, during the year 1975?", ["0.28"], "L"),
        row(24580, 14465, "What is the name of the university?", ["university of california", "University of California"]),
        row(57349, 4733, "What is the first heading?", ["Paul"]),
        row(57350, 4733, "Who signed the letter?", ["Dr. A. Meyer", "A. Meyer"]),
        row(24581, 4734, "What is the page number at the bottom?", ["3"]),
        row(32777, 4735, "What is the telephone number?", ["(919) 555-0132", "919 555-0132"]))}


def pope():
    def row(number, category, question_id, image, thing, answer):
        return (str(number), str(question_id), f"Is there a {thing} in the image?", answer, f"COCO_val2014_{image:012}",
                picture(f"pope/{image}"), category)
    return {("default", "test"): table(
        {"id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": PICTURE, "category": TEXT},
        row(0, "adversarial", 1, 310196, "snowboard", "yes"),
        row(1, "adversarial", 2, 310196, "backpack", "no"),
        row(2, "adversarial", 3, 210789, "car", "no"),
        row(3, "popular", 1, 310196, "snowboard", "yes"),
        row(4, "popular", 2, 310196, "dining table", "no"),
        row(5, "popular", 3, 210789, "person", "yes"),
        row(6, "random", 1, 310196, "snowboard", "yes"),
        row(7, "random", 2, 310196, "toaster", "no"),
        row(8, "random", 3, 210789, "bicycle", "yes"))}


def hallusionbench():
    """Set, figure and question numbers begin anew in every subcategory"""
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id", "question", "gt_answer_details",
             "gt_answer", "filename")

    def row(category, subcategory, set_id, figure, question_id, question, answer):
        name = f"{category}/{subcategory}/{set_id}_{figure}.png"
        return (category, subcategory, "1" if figure == "0" else "2", set_id, figure, "note", question_id, question,
                "It is so." if answer == "1" else "It is not so.", answer, "./hallusion_bench/" + name, picture(f"hallusion/{name}"))
    return {("default", "image"): table(
        {**dict.fromkeys(names, TEXT), "image": PICTURE},
        row("VD", "illusion", "0", "0", "0", "Is the left circle larger than the right one?", "0"),
        row("VD", "illusion", "0", "1", "0", "Is the left circle larger than the right one?", "1"),
        row("VD", "illusion", "0", "0", "1", "Are the two circles the same size?", "1"),
        row("VD", "illusion", "0", "1", "1", "Are the two circles the same size?", "0"),
        row("VD", "figure", "0", "0", "0", "Is the man in the picture jumping?", "1"),
        row("VD", "figure", "0", "1", "0", "Is the man in the picture jumping?", "0"),
        row("VS", "chart", "0", "1", "0", "According to the chart, did Cuba win more medals than Kenya?", "1"),
        row("VS", "chart", "0", "2", "0", "According to the chart, did Cuba win more medals than Kenya?", "0"))}


def naturalbench():
    """Groups of four: question 0 on pictures 0 and 1, question 1 on pictures 0 and 1; right are yes, no, no, yes (A, B, B, A)"""
    groups = (("Is the cat awake?", "Is the cat asleep?", "yes_no", "Yes", "No"),
              ("What is the man doing?\nOption: A: Running; B: Sitting;", "Where is the man?\nOption: A: At home; B: In a park;",
               "multiple_choice", "A", "B"),
              ("Are there two boats?", "Is the sea rough?", "yes_no", "Yes", "No"))
    rows = []
    for group, (first, second, kind, one, other) in enumerate(groups):
        for question, image, answer in ((first, 0, one), (first, 1, other), (second, 0, other), (second, 1, one)):
            rows.append((len(rows), picture(f"naturalbench/{group} {image}"), question, answer, kind))
    return {("default", "test"): table({"Index": INTEGER, "Image": PICTURE, "Question": TEXT, "Answer": TEXT, "Question_Type": TEXT}, *rows)}


def vqav2():
    features = {"question_type": TEXT, "multiple_choice_answer": TEXT,
                "answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": INTEGER}),
                "image_id": INTEGER, "answer_type": TEXT, "question_id": INTEGER, "question": TEXT, "image": PICTURE}

    def row(image, number, question, answers, kind="other"):
        listed = [{"answer": answer, "answer_confidence": "maybe" if i % 4 == 3 else "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]
        return (" ".join(question.lower().split()[:2]), answers[0], listed, image, kind, 1000 * image + number, question, picture(f"vqav2/{image}"))
    return {("default", "validation"): table(
        features,
        row(262148, 0, "Where is he looking?", ["down"] * 8 + ["at table", "skateboard"]),
        row(262148, 1, "What are the people in the background doing?", ["watching"] * 5 + ["spectating"] * 4 + ["standing"]),
        row(262148, 2, "Is he wearing a hat?", ["yes"] * 10, "yes/no"),
        row(393225, 0, "What sits next to the bread?", ["spoon"] * 9 + ["a spoon"]),
        row(393225, 1, "How many bowls are there?", ["2"] * 6 + ["two"] * 4, "number"),
        row(393225, 2, "Is this a healthy meal?", ["yes", "no"] * 5, "yes/no"),
        row(240301, 0, "What colour is the woman's t-shirt?", ["red", "dark red"] * 2 + ["red & white"] * 6))}


def okvqa():
    def row(number, image, question, answers):
        return (str(number), picture(f"okvqa/{image}"), question, answers, "five", "other")
    return {("default", "val2014"): table(
        {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answers": List(TEXT), "question_type": TEXT, "answer_type": TEXT},
        row(2971475, 297147, "What sport can you use this for?", ["race"] * 4 + ["motocross"] * 4 + ["ride"] * 2),
        row(3397615, 339761, "Name the type of plant this is?", ["vine"] * 6 + ["climb", "look plant"] * 2),
        row(3397616, 339761, "Why would one put it in a pot?", ["decoration"] * 10),
        row(3573345, 357334, "Is this in a museum?", ["yes"] * 8 + ["no"] * 2),
        row(3573346, 357334, "Who invented this toy?", ["margarete steiff"] * 6 + ["teddy roosevelt"] * 4))}


SETS = {"lmms-lab/MMBench_EN": mmbench_en, "lmms-lab-encoder/MMBench": mmbench_new, "lmms-lab-encoder/MME": mme, "lmms-lab-encoder/SEED-Bench": seed,
        "lmms-lab-encoder/GQA": gqa, "lmms-lab-encoder/ScienceQA": scienceqa, "lmms-lab-encoder/MMMU": mmmu, "AI4Math/MathVista": mathvista,
        "lmms-lab-encoder/ai2d": ai2d, "lmms-lab-encoder/ChartQA": chartqa, "echo840/OCRBench": ocrbench, "lmms-lab-encoder/textvqa": textvqa,
        "lmms-lab-encoder/DocVQA": docvqa, "lmms-lab-eval/MMVP": mmvp, "lmms-lab-encoder/RealWorldQA": realworldqa, "nyu-visionx/CV-Bench": cvbench,
        "lmms-lab-encoder/POPE": pope, "lmms-lab-encoder/HallusionBench": hallusionbench, "BaiqiL/NaturalBench-lmms-eval": naturalbench,
        "BLINK-Benchmark/BLINK": blink, "lmms-lab-encoder/VQAv2": vqav2, "lmms-lab-encoder/OK-VQA": okvqa}

# ---- what a reader makes of them ------------------------------------------------------------------------------------------------

LETTER = "\nAnswer with the option's letter from the given choices directly."
ONLY_LETTER = "\nPlease answer directly with only the letter of the correct option and nothing else."
SHORT = "\nAnswer the question using a single word or phrase."
DIRECT = "\nGive the short answer directly."
REASON = "\nFirst show your reasoning process and then give the final answer."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
NOTE_2 = "Note: You only need to respond with A, B without providing any additional information.\n"
NOTE_3 = "Note: You only need to respond with A, B, C without providing any additional information.\n"
NOTE_4 = "Note: You only need to respond with A, B, C, D without providing any additional information.\n"
NOTE_5 = "Note: You only need to respond with A, B, C, D, E without providing any additional information.\n"


def ending(line, pairs):
    """Questions that all end with the same line"""
    return [(question + line, gold) for question, gold in pairs]


def both(expected):
    """The same in both profiles"""
    return {"paper": expected, "lmms": expected}


GQA = [("Is it overcast?", "no"), ("Who is wearing the dress?", "woman"), ("Are the napkin and the cup the same colour?", "yes"),
       ("What is in front of the house?", "fence"), ("On which side is the chair?", "left"), ("What kind of furniture is it?", "coffee table")]
AI2D = [("Which letter marks the root?\nA. a\nB. b\nC. c\nD. d", "C"),
        ("What do mice eat in this food web?\nA. grass\nB. owls\nC. snakes\nD. foxes", "A"),
        ("What would happen if the owls died out?\nA. more mice\nB. fewer mice\nC. no grass\nD. nothing", "A"),
        ("How many moons does the diagram show?\nA. 1\nB. 2\nC. 4\nD. 3", "D"),
        ("What stage follows the egg?\nA. adult\nB. larva\nC. pupa\nD. none of the above", "B"),
        ("Which part absorbs water?\nA. leaf\nB. stem\nC. root\nD. flower", "C")]
CHARTQA = [("What is the value of the tallest bar?", "57"), ("Is the blue line above the red one in 2010?", "Yes"),
           ("What share of people chose tea?", "25%"), ("How many bars are below ten?", "0"), ("In what year did sales peak?", "2014"),
           ("What was the rate in 2001?", "0.34")]
OCRBENCH = [("what is written in the image?", ["CENTRE"]), ("what is the number in the image?", ["40982"]),
            ("what brand is the watch?", ["casio", "g shock"]), ("When was the letter sent?", ["March 3, 1998"]),
            ("what is the total amount? Answer this question using the text in the image directly.", ["12.50"]),
            ("Please write out the expression of the formula in the image using LaTeX format.", [r"\frac { 1 } { 2 } X + y"])]
DOCVQA = [("What is the actual value per 1000, during the year 1975?", ["0.28"]),
          ("What is the name of the university?", ["university of california", "University of California"]),
          ("What is the first heading?", ["Paul"]), ("Who signed the letter?", ["Dr. A. Meyer", "A. Meyer"]),
          ("What is the page number at the bottom?", ["3"]), ("What is the telephone number?", ["(919) 555-0132", "919 555-0132"])]
REALWORLDQA = [("Where does the road lead?\n\nA. To the left.\nB. Straight on.\nC. To the right." + ONLY_LETTER, "B"),
               ("How many cars are parked on the left?\nPlease answer directly with a single word or number.", "3"),
               ("Is the traffic light red?\nPlease answer directly with a single word or number.", "No"),
               ("Which object is taller?\n\nA. The tree\nB. The house" + ONLY_LETTER, "A"),
               ("What is the speed limit?\nPlease answer directly with a single word or number.", "50"),
               ("Can a truck pass under the bridge?\nPlease answer directly with a single word or number.", "Yes")]
POPE = [("Is there a snowboard in the image?", "yes"), ("Is there a backpack in the image?", "no"), ("Is there a car in the image?", "no"),
        ("Is there a snowboard in the image?", "yes"), ("Is there a dining table in the image?", "no"), ("Is there a person in the image?", "yes"),
        ("Is there a snowboard in the image?", "yes"), ("Is there a toaster in the image?", "no"), ("Is there a bicycle in the image?", "yes")]
HALLUSIONBENCH = [("Is the left circle larger than the right one?", "0"), ("Is the left circle larger than the right one?", "1"),
                  ("Are the two circles the same size?", "1"), ("Are the two circles the same size?", "0"),
                  ("Is the man in the picture jumping?", "1"), ("Is the man in the picture jumping?", "0"),
                  ("According to the chart, did Cuba win more medals than Kenya?", "1"),
                  ("According to the chart, did Cuba win more medals than Kenya?", "0")]
NATURALBENCH = [
    ("Is the cat awake? Please answer Yes or No.", "Yes"), ("Is the cat awake? Please answer Yes or No.", "No"),
    ("Is the cat asleep? Please answer Yes or No.", "No"), ("Is the cat asleep? Please answer Yes or No.", "Yes"),
    ("What is the man doing?\nOption: A: Running; B: Sitting; Please output the letter corresponding to the correct option.", "A"),
    ("What is the man doing?\nOption: A: Running; B: Sitting; Please output the letter corresponding to the correct option.", "B"),
    ("Where is the man?\nOption: A: At home; B: In a park; Please output the letter corresponding to the correct option.", "B"),
    ("Where is the man?\nOption: A: At home; B: In a park; Please output the letter corresponding to the correct option.", "A"),
    ("Are there two boats? Please answer Yes or No.", "Yes"), ("Are there two boats? Please answer Yes or No.", "No"),
    ("Is the sea rough? Please answer Yes or No.", "No"), ("Is the sea rough? Please answer Yes or No.", "Yes")]
VQAV2 = [("Where is he looking?", ["down"] * 8 + ["at table", "skateboard"]),
         ("What are the people in the background doing?", ["watching"] * 5 + ["spectating"] * 4 + ["standing"]),
         ("Is he wearing a hat?", ["yes"] * 10), ("What sits next to the bread?", ["spoon"] * 9 + ["a spoon"]),
         ("How many bowls are there?", ["2"] * 6 + ["two"] * 4), ("Is this a healthy meal?", ["yes", "no"] * 5),
         ("What colour is the woman's t-shirt?", ["red", "dark red", "red", "dark red"] + ["red & white"] * 6)]
OKVQA = [("What sport can you use this for?", ["race"] * 4 + ["motocross"] * 4 + ["ride"] * 2),
         ("Name the type of plant this is?", ["vine"] * 6 + ["climb", "look plant", "climb", "look plant"]),
         ("Why would one put it in a pot?", ["decoration"] * 10), ("Is this in a museum?", ["yes"] * 8 + ["no"] * 2),
         ("Who invented this toy?", ["margarete steiff"] * 6 + ["teddy roosevelt"] * 4)]

EXPECTED = {
    "mme": {
        "paper": ending(SHORT, [
            ("Is there a dog in this image? Please answer yes or no.", "Yes"),
            ("Are there three apples in this image? Please answer yes or no.", "No"),
            ('Does the sign say "open"? Please answer yes or no.', "Yes"), ("Does the program print 5? Please answer yes or no.", "No"),
            ("Is there a tree in this image? Please answer yes or no.", "Yes"), ('Does the text mean "quiet sea"? Please answer yes or no.', "No"),
            ("Are there two apples in this image? Please answer yes or no.", "Yes"),
            ("Is there a fridge in this image? Please answer yes or no.", "No"),
            ('Does the text mean "tall tower"? Please answer yes or no.', "Yes"), ('Does the sign say "closed"? Please answer yes or no.', "No"),
            ("Does the program print 8? Please answer yes or no.", "Yes"), ("Is there a boat in this image? Please answer yes or no.", "No")]),
        "lmms": ending(SHORT, [
            ("Is there a dog in this image?", "Yes"), ("Are there three apples in this image?", "No"), ('Does the sign say "open"?', "Yes"),
            ("Does the program print 5?", "No"), ("Is there a tree in this image?", "Yes"), ('Does the text mean "quiet sea"?', "No"),
            ("Are there two apples in this image?", "Yes"), ("Is there a fridge in this image?", "No"), ('Does the text mean "tall tower"?', "Yes"),
            ('Does the sign say "closed"?', "No"), ("Does the program print 8?", "Yes"), ("Is there a boat in this image?", "No")])},
    "mmbench": {
        "paper": ending(LETTER, [
            ("The arrow on the map points up.\nWhich way does the arrow point? Options:\nA. north\nB. south", "A"),
            ("How warm is the drink? Options:\nA. cold\nB. warm\nC. hot", "A"),
            ("Which shape is in the middle? Options:\nA. circle\nB. square\nC. star\nD. cross", "C"),
            ("The arrow on the map points up.\nWhich way does the arrow point? Options:\nA. south\nB. north", "B"),
            ("How warm is the drink? Options:\nA. warm\nB. hot\nC. cold", "C"),
            ("Which shape is in the middle? Options:\nA. square\nB. star\nC. cross\nD. circle", "B"),
            ("How warm is the drink? Options:\nA. hot\nB. cold\nC. warm", "B"),
            ("Which shape is in the middle? Options:\nA. star\nB. cross\nC. circle\nD. square", "A"),
            ("Which shape is in the middle? Options:\nA. cross\nB. circle\nC. square\nD. star", "D")]),
        "lmms": ending("\n" + LETTER, [
            ("The arrow on the map points up. Which way does the arrow point? There are several options:\nA. north\nB. south", "A"),
            ("How warm is the drink? There are several options:\nA. cold\nB. warm\nC. hot", "A"),
            ("Which shape is in the middle? There are several options:\nA. circle\nB. square\nC. star\nD. cross", "C"),
            ("The arrow on the map points up. Which way does the arrow point? There are several options:\nA. south\nB. north", "B"),
            ("How warm is the drink? There are several options:\nA. warm\nB. hot\nC. cold", "C"),
            ("Which shape is in the middle? There are several options:\nA. square\nB. star\nC. cross\nD. circle", "B"),
            ("How warm is the drink? There are several options:\nA. hot\nB. cold\nC. warm", "B"),
            ("Which shape is in the middle? There are several options:\nA. star\nB. cross\nC. circle\nD. square", "A"),
            ("Which shape is in the middle? There are several options:\nA. cross\nB. circle\nC. square\nD. star", "D")])},
    "seed": {
        "paper": ending(LETTER, [
            ("How many towels are in the picture? Options:\nA. One\nB. Two\nC. Three\nD. Four", "A"),
            ("Where is the mirror? Options:\nA. In the sink\nB. On the floor\nC. On the wall\nD. Under the bed", "C"),
            ("What colour is the car? Options:\nA. Red\nB. Green\nC. Blue\nD. White", "D"),
            ("What is the scene? Options:\nA. A street\nB. A beach\nC. A kitchen\nD. A forest", "B"),
            ("What is written on the sign? Options:\nA. Exit\nB. Enter\nC. Open\nD. Stop", "A")]),
        "lmms": ending(LETTER, [
            ("How many towels are in the picture?\nA. One\nB. Two\nC. Three\nD. Four", "A"),
            ("Where is the mirror?\nA. In the sink\nB. On the floor\nC. On the wall\nD. Under the bed", "C"),
            ("What colour is the car?\nA. Red\nB. Green\nC. Blue\nD. White", "D"),
            ("What is the scene?\nA. A street\nB. A beach\nC. A kitchen\nD. A forest", "B"),
            ("What is written on the sign?\nA. Exit\nB. Enter\nC. Open\nD. Stop", "A")])},
    "gqa": both(ending(SHORT, GQA)),
    "scienceqa": {
        "paper": ending(ONLY_LETTER, [
            ("Which of these states is farthest north?\nA. Ohio\nB. Maine\nC. Texas\nD. Utah", "B"),
            ("The spoon in the picture is made of steel. Is the spoon an insulator?\nA. yes\nB. no", "B"),
            ("Select the better answer. Which property do these three objects have in common?\nA. hard\nB. soft\nC. salty", "A"),
            ("Ada rolled a ball down a ramp.\nFigure: a ball on a ramp. What can the two students test?\nA. the size of the seed\n"
             "B. the speed of the ball", "B"),
            ("Which pair is closer together?\nA. Pair 1.\nB. Pair 2.\nC. Both the same.", "C"),
            ("What is the name of the colony shown?\nA. New York\nB. Virginia\nC. Delaware\nD. Maryland", "D")]),
        "lmms": ending(LETTER, [
            ("Which of these states is farthest north?\nA. Ohio\nB. Maine\nC. Texas\nD. Utah", "B"),
            ("Context: The spoon in the picture is made of steel.\nIs the spoon an insulator?\nA. yes\nB. no", "B"),
            ("Context: Select the better answer.\nWhich property do these three objects have in common?\nA. hard\nB. soft\nC. salty", "A"),
            ("Context: Ada rolled a ball down a ramp.\nFigure: a ball on a ramp.\nWhat can the two students test?\nA. the size of the seed\n"
             "B. the speed of the ball", "B"),
            ("Which pair is closer together?\nA. Pair 1.\nB. Pair 2.\nC. Both the same.", "C"),
            ("What is the name of the colony shown?\nA. New York\nB. Virginia\nC. Delaware\nD. Maryland", "D")])},
    "mmmu": {  # a tag goes and its blanks stay, in paper; it stays in lmms
        "paper": [
            ("Which style does the work in  show? Options:\nA. Cubism\nB. Baroque\nC. Gothic\nD. Realism\nE. Pop art" + LETTER, "E"),
            (" What is the length of the side x?" + SHORT, "5.66"),
            ("Which law explains what happens in ? Options:\nA. Hooke's law\nB. Ohm's law\nC. The law of \"least action\"" + LETTER, "B"),
            ("Compare  with . Which cell is older? Options:\nA. The first\nB. The second\nC. Neither" + LETTER, "A"),
            ("How much does the stock in  cost?" + SHORT, ["$6", "six dollars"]),
            ("Which of these is a leaf? Options:\nA. \nB. \nC. " + LETTER, "C"),
            (" has an arrow. Where does the arrow of  point? Options:\nA. Left\nB. Right" + LETTER, "B")],
        "lmms": [
            ("Which style does the work in <image 1> show?\nA. Cubism\nB. Baroque\nC. Gothic\nD. Realism\nE. Pop art\n" + LETTER, "E"),
            ("<image 1> What is the length of the side x?\n" + SHORT, "5.66"),
            ("Which law explains what happens in <image 1>?\nA. Hooke's law\nB. Ohm's law\nC. The law of \"least action\"\n" + LETTER, "B"),
            ("How much does the stock in <image 1> cost?\n" + SHORT, ["$6", "six dollars"]),
            ("<image 1> has an arrow. Where does the arrow of <image 1> point?\nA. Left\nB. Right\n" + LETTER, "B")]},
    "mathvista": {
        "paper": [
            ("Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, "
             "e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How far does the spring stretch?" + SHORT, "1.2"),
            ("Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
             "Question: What fraction of the shape is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6/11\n(D) 3/5" + REASON, "B"),
            ("Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\n"
             "Question: Subtract all red cubes. How many objects are left?" + SHORT, "6"),
            ("Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], "
             "at the end.\nQuestion: Between which two years does the line peak?" + SHORT, "[2007, 2008]"),
            ("Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
             "Question: Is the green curve the highest?\nChoices:\n(A) No\n(B) Yes" + REASON, "A"),
            ("Hint: Please answer the question requiring a floating-point number with two decimal places and provide the final value, "
             "e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How much do the two sweets cost? (Unit: $)" + SHORT, "1.45")],
        "lmms": [  # its shot type "format-prompt"
            ("How far does the spring stretch?\nAnswer the question using a single floating-point number with one decimal place.", "1.2"),
            ("What fraction of the shape is blue?\nA. 3/11\nB. 8/11\nC. 6/11\nD. 3/5" + LETTER, "B"),
            ("Subtract all red cubes. How many objects are left?\nAnswer the question using a single integer number.", "6"),
            ("Between which two years does the line peak?\nAnswer the question using a Python list.", "[2007, 2008]"),
            ("Is the green curve the highest?\nA. No\nB. Yes" + LETTER, "A"),
            ("How much do the two sweets cost? (Unit: $)\nAnswer the question using a single floating-point number with two decimal places.",
             "1.45")]},
    "ai2d": both(ending(LETTER, AI2D)),
    "chartqa": {"paper": ending("\nAnswer the question using a single number or phrase.", CHARTQA),
                "lmms": ending("\nAnswer the question with a single word.", CHARTQA)},
    "ocrbench": {"paper": ending(DIRECT, OCRBENCH), "lmms": OCRBENCH},
    "textvqa": {
        "paper": ending(SHORT, [
            ("what is the brand of this camera?\nReference OCR tokens: DAKOTA, DIGITAL", ["dakota"] * 7 + ["dakota digital"] * 2 + ["clos culombu"]),
            ("Is this a shop in New York?\nReference OCR tokens: DAKOTA, DIGITAL", ["yes"] * 10),
            ("what number is on the player's shirt?\nReference OCR tokens: 22", ["22"] * 9 + ["22."]),
            ("what does the white sign say?\nReference OCR tokens:", ["unanswerable"] * 4 + ["stop", "no stopping"] * 3),
            ("who is the author of the book?\nReference OCR tokens: Jo, Mill,, 2nd, ed.", ["jo mill"] * 8 + ["mill", "jo"]),
            ("what time is it on the clock?\nReference OCR tokens: XII, VI", ["5:41", "5:40"] * 5)]),
        "lmms": ending(SHORT, [
            ("What is the brand of this camera?", ["dakota"] * 7 + ["dakota digital"] * 2 + ["clos culombu"]),
            ("Is this a shop in new york?", ["yes"] * 10), ("What number is on the player's shirt?", ["22"] * 9 + ["22."]),
            ("What does the white sign say?", ["unanswerable"] * 4 + ["stop", "no stopping"] * 3),
            ("Who is the author of the book?", ["jo mill"] * 8 + ["mill", "jo"]), ("What time is it on the clock?", ["5:41", "5:40"] * 5)])},
    "docvqa": both(ending(SHORT, DOCVQA)),  # the paper took lmms-eval for this one
    "mmvp": {
        "paper": ending(LETTER, [
            ("Are the wings spread or folded? Options:\nA. Spread\nB. Folded", "A"),
            ("Are the wings spread or folded? Options:\nA. Spread\nB. Folded", "B"),
            ("Is the dog facing left or right? Options:\nA. Left\nB. Right", "B"),
            ("Is the dog facing left or right? Options:\nA. Left\nB. Right", "A"),
            ("Does the cup have a handle? Options:\nA. Yes\nB. No", "B"),
            ("Does the cup have a handle? Options:\nA. Yes\nB. No", "A")]),
        "lmms": ending(LETTER, [
            ("Are the wings spread or folded?\nA. Spread\nB. Folded", "A"), ("Are the wings spread or folded?\nA. Spread\nB. Folded", "B"),
            ("Is the dog facing left or right?\nA. Left\nB. Right", "B"), ("Is the dog facing left or right?\nA. Left\nB. Right", "A"),
            ("Does the cup have a handle?\nA. Yes\nB. No", "B"), ("Does the cup have a handle?\nA. Yes\nB. No", "A")])},
    "realworldqa": both(REALWORLDQA),
    "cvbench2d": {
        "paper": ending(LETTER, [
            ("How many lamps are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0", "C"),
            ("Where is the bed with respect to the lamp? Select from the following choices.\n(A) left\n(B) right", "A"),
            ("How many dogs are in the image? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2\n(D) 3\n(E) 4", "E"),
            ("Where is the cat with respect to the sofa? Select from the following choices.\n(A) above\n(B) below", "B"),
            ("How many kites are in the image? Select from the following choices.\n(A) 5\n(B) 6\n(C) 7\n(D) 8", "D"),
            ("Where is the door with respect to the desk? Select from the following choices.\n(A) left\n(B) right", "B")]),
        "lmms": [
            (NOTE_4 + "\nHow many lamps are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0", "C"),
            (NOTE_2 + "\nWhere is the bed with respect to the lamp? Select from the following choices.\n(A) left\n(B) right", "A"),
            (NOTE_5 + "\nHow many dogs are in the image? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2\n(D) 3\n(E) 4", "E"),
            (NOTE_2 + "\nWhere is the cat with respect to the sofa? Select from the following choices.\n(A) above\n(B) below", "B"),
            (NOTE_4 + "\nHow many kites are in the image? Select from the following choices.\n(A) 5\n(B) 6\n(C) 7\n(D) 8", "D"),
            (NOTE_2 + "\nWhere is the door with respect to the desk? Select from the following choices.\n(A) left\n(B) right", "B")]},
    "cvbench3d": {
        "paper": ending(LETTER, [
            ("Which object is closer to the camera, the table (red box) or the chair (blue box)? Select from the following choices.\n"
             "(A) table\n(B) chair", "A"),
            ("Which object is closer to the camera, the lamp (red box) or the bed (blue box)? Select from the following choices.\n"
             "(A) lamp\n(B) bed", "B"),
            ("Which object is closer to the sink (red box), the door (blue box) or the window (green box)? Select from the following choices.\n"
             "(A) door\n(B) window", "B"),
            ("Which object is closer to the car (red box), the bus (blue box) or the van (green box)? Select from the following choices.\n"
             "(A) bus\n(B) van", "A")]),
        "lmms": [
            (NOTE_2 + "\nWhich object is closer to the camera, the table (red box) or the chair (blue box)? Select from the following choices.\n"
             "(A) table\n(B) chair", "A"),
            (NOTE_2 + "\nWhich object is closer to the camera, the lamp (red box) or the bed (blue box)? Select from the following choices.\n"
             "(A) lamp\n(B) bed", "B"),
            (NOTE_2 + "\nWhich object is closer to the sink (red box), the door (blue box) or the window (green box)? "
             "Select from the following choices.\n(A) door\n(B) window", "B"),
            (NOTE_2 + "\nWhich object is closer to the car (red box), the bus (blue box) or the van (green box)? Select from the following choices.\n"
             "(A) bus\n(B) van", "A")]},
    "pope": both(ending(SHORT, POPE)),
    "hallusionbench": both([(prompt, ("no", "yes")[int(gold)]) for prompt, gold in HALLUSIONBENCH]),
    "naturalbench": both(NATURALBENCH),
    "blink": {
        "paper": ending(ONLY_LETTER, [
            ("How many blue floats are there?\nSelect from the following choices.\n(A) 0\n(B) 3\n(C) 2\n(D) 1", "D"),
            ("How many birds are flying?\nSelect from the following choices.\n(A) 4\n(B) 5\n(C) 6\n(D) 7", "A"),
            ("Which figure comes next?\nSelect from the following choices.\n(A) picture A\n(B) picture B\n(C) picture C\n(D) picture D", "C"),
            ("Which piece is missing?\nSelect from the following choices.\n(A) picture A\n(B) picture B\n(C) picture C\n(D) picture D", "B"),
            ("Which box is around the bicycle?\nSelect from the following choices.\n(A) Box A\n(B) Box B", "A"),
            ("Which box is around the cup?\nSelect from the following choices.\n(A) Box A\n(B) Box B", "B"),
            ("Which point is closer to the camera?\nSelect from the following choices.\n(A) A is closer\n(B) B is closer", "B"),
            ("Which point is farther from the camera?\nSelect from the following choices.\n(A) A is farther\n(B) B is farther", "A"),
            ("Which point is darker?\nSelect from the following choices.\n(A) A is darker\n(B) B is darker\n(C) About the same", "C"),
            ("Which point is brighter?\nSelect from the following choices.\n(A) A is brighter\n(B) B is brighter\n(C) About the same", "A"),
            ("Is the car beneath the cat?\nSelect from the following choices.\n(A) yes\n(B) no", "A"),
            ("Is the bench behind the boat?\nSelect from the following choices.\n(A) yes\n(B) no", "B")]),
        "lmms": [
            (NOTE_4 + "How many blue floats are there?\nSelect from the following choices.\n(A) 0\n(B) 3\n(C) 2\n(D) 1", "D"),
            (NOTE_4 + "How many birds are flying?\nSelect from the following choices.\n(A) 4\n(B) 5\n(C) 6\n(D) 7", "A"),
            (NOTE_4 + "Which figure comes next?\nSelect from the following choices.\n"
             "(A) picture A\n(B) picture B\n(C) picture C\n(D) picture D", "C"),
            (NOTE_4 + "Which piece is missing?\nSelect from the following choices.\n(A) picture A\n(B) picture B\n(C) picture C\n(D) picture D", "B"),
            (NOTE_2 + "Which box is around the bicycle?\nSelect from the following choices.\n(A) Box A\n(B) Box B", "A"),
            (NOTE_2 + "Which box is around the cup?\nSelect from the following choices.\n(A) Box A\n(B) Box B", "B"),
            (NOTE_2 + "Which point is closer to the camera?\nSelect from the following choices.\n(A) A is closer\n(B) B is closer", "B"),
            (NOTE_2 + "Which point is farther from the camera?\nSelect from the following choices.\n(A) A is farther\n(B) B is farther", "A"),
            (NOTE_3 + "Which point is darker?\nSelect from the following choices.\n(A) A is darker\n(B) B is darker\n(C) About the same", "C"),
            (NOTE_3 + "Which point is brighter?\nSelect from the following choices.\n(A) A is brighter\n(B) B is brighter\n(C) About the same", "A"),
            (NOTE_2 + "Is the car beneath the cat?\nSelect from the following choices.\n(A) yes\n(B) no", "A"),
            (NOTE_2 + "Is the bench behind the boat?\nSelect from the following choices.\n(A) yes\n(B) no", "B")]},
    "vqav2": both(ending(SHORT, VQAV2)),
    "okvqa": both(ending(UNANSWERABLE, OKVQA)),
}
