"""Small data sets in the layouts of the official files; images are drawn here.

What people said is chosen so that scores of known answers can be worked by hand
(`tests/test_eval.py`).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    """An image of one colour with a bright square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), rng.integers(0, 200, 3), np.uint8)
    y, x = rng.integers(0, 15, 2)
    pixels[y : y + 10, x : x + 10] = 255
    Image.fromarray(pixels).save(path)


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def video(path: Path, seed: int, frames: int = 12) -> None:
    """An H.264 clip whose colour changes."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for n in range(frames):
            pixels = np.full((32, 32, 3), (20 * n % 256, 10 * seed % 256, 99), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


# No word is in two of them: a caption is like one of its references and unlike all else.
CAPTIONS = [
    ("red cats sleep on mats", "some feline rests upon rugs"),
    ("two dogs run through parks", "hounds race across green lawns"),
    ("tall men ride brown horses", "cowboys mount their dark steeds"),
    ("bowls hold fresh ripe fruit", "apples lie inside white dishes"),
    ("boats cross wide blue lakes", "ships sail over deep water"),
    ("girls throw small yellow balls", "children toss round light toys"),
]


def coco_caption(root: Path, test: int = 4) -> None:
    """Karpathy's file; some images to test, four to take examples from."""
    images = []
    for n in range(test + 4):
        name = f"COCO_val2014_{n:012d}.jpg"
        draw(root / "val2014" / name, n)
        images.append(
            {
                "filepath": "val2014",
                "filename": name,
                "imgid": 100 + n,
                "cocoid": n,
                "split": "test" if n < test else "train",
                "sentences": [{"raw": f"{text.capitalize()}."} for text in CAPTIONS[n % 6]],
            }
        )
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})


def flickr30k(root: Path) -> None:
    images = []
    for n in range(3):
        draw(root / "flickr30k-images" / f"{n}.jpg", n)
        images.append(
            {
                "filename": f"{n}.jpg",
                "imgid": n,
                "split": "test",
                "sentences": [{"raw": text} for text in CAPTIONS[n]],
            }
        )
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def nocaps(root: Path) -> None:
    images, annotations = [], []
    for n in range(6):
        domain = ["in-domain", "near-domain", "out-domain"][n // 2]
        draw(root / "val" / f"{n:016x}.jpg", n)
        images.append({"id": n, "file_name": f"{n:016x}.jpg", "domain": domain})
        annotations += [{"image_id": n, "caption": text} for text in CAPTIONS[n]]
    write(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})


QUESTIONS = [
    ("What colour is the cat?", ["red"] * 6 + ["orange"] * 2 + ["pink"] * 2),
    ("How many dogs are there?", ["2"] * 10),
    ("Is it {raining}?", ["no"] * 8 + ["yes"] * 2),
]


def _vqa(root: Path, questions: str, annotations: str) -> None:
    for split in ("train2014", "val2014"):
        rows, answers = [], []
        for n, (question, people) in enumerate(QUESTIONS):
            image = n // 2 if split == "val2014" else n + 10
            draw(root / split / f"COCO_{split}_{image:012d}.jpg", image)
            rows.append({"image_id": image, "question": question, "question_id": 1000 * image + n})
            answers.append(
                {
                    "question_id": 1000 * image + n,
                    "image_id": image,
                    "answer_type": "other",
                    "question_type": "what",
                    "multiple_choice_answer": people[0],
                    "answers": [
                        {"answer": a, "answer_id": i, "answer_confidence": "yes"}
                        for i, a in enumerate(people, 1)
                    ],
                }
            )
        write(root / questions.format(split), {"questions": rows})
        write(root / annotations.format(split), {"annotations": answers})


def vqav2(root: Path) -> None:
    _vqa(root, "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json")


def okvqa(root: Path) -> None:
    _vqa(root, "OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json")


def vizwiz(root: Path) -> None:
    for split in ("train", "val"):
        rows = []
        for n, (question, people) in enumerate(QUESTIONS):
            people = ["unanswerable"] * 10 if n == 1 else people
            name = f"VizWiz_{split}_{n:08d}.jpg"
            draw(root / split / name, n + 5)
            rows.append(
                {
                    "image": name,
                    "question": question,
                    "answer_type": "other",
                    "answerable": int(n != 1),
                    "answers": [{"answer": a, "answer_confidence": "yes"} for a in people],
                }
            )
        write(root / "Annotations" / f"{split}.json", rows)


def visdial(root: Path) -> None:
    """Two dialogues of two rounds, four options in each."""
    questions = ["is it a cat", "what colour is it", "is it old"]
    answers = ["yes", "no", "it is red", "i can't tell", "brown"]
    for split, folder, stem in (
        ("val", "VisualDialog_val2018", "VisualDialog_val2018"),
        ("train", "train2014", "COCO_train2014"),
    ):
        dialogs = []
        for n in range(2 if split == "val" else 4):
            draw(root / folder / f"{stem}_{n:012d}.jpg", n)
            dialogs.append(
                {
                    "image_id": n,
                    "caption": "a cat",
                    "dialog": [
                        {"question": 0, "answer": 0, "answer_options": [0, 1, 2, 3], "gt_index": 0},
                        {
                            "question": 1 + n % 2,
                            "answer": 2,
                            "answer_options": [1, 4, 2, 0],
                            "gt_index": 2,
                        },
                    ],
                }
            )
        content = {"questions": questions, "answers": answers, "dialogs": dialogs}
        write(root / f"visdial_1.0_{split}.json", {"split": split, "data": content})
    write(
        root / "visdial_1.0_val_dense_annotations.json",
        [{"image_id": 0, "round_id": 2, "gt_relevance": [0.0, 0.5, 1.0, 0.0]}],
    )


def coco_fid(root: Path) -> None:
    images, annotations = [], []
    for n in range(5):
        name = f"COCO_val2014_{n:012d}.jpg"
        draw(root / "val2014" / name, n)
        images.append({"id": n, "file_name": name})
        annotations.append({"id": 50 + n, "image_id": n, "caption": CAPTIONS[n % 4][0]})
    write(
        root / "annotations" / "captions_val2014.json",
        {"images": images, "annotations": annotations},
    )


def mmvet(root: Path) -> None:
    rows = {}
    for n in range(2):
        draw(root / "images" / f"v1_{n}.png", n)
        rows[f"v1_{n}"] = {
            "imagename": f"v1_{n}.png",
            "question": "What is x in the equation?",
            "answer": "-1<AND>-5",
            "imagesource": "web",
            "capability": ["math"],
        }
    write(root / "mm-vet.json", rows)


def msrvttqa(root: Path) -> None:
    for split, first in (("test", 0), ("train", 10)):
        rows = []
        for n in range(3):
            video(root / "video" / f"video{first + n}.mp4", first + n)
            rows.append(
                {
                    "answer": ["cat", "man", "ball"][n],
                    "category_id": 1,
                    "id": first + n,
                    "question": ["what runs?", "who is singing?", "what is it?"][n],
                    "video_id": first + n,
                }
            )
        write(root / f"{split}_qa.json", rows)


def msvdqa(root: Path) -> None:
    for split, first in (("test", 1), ("train", 11)):
        rows = []
        for n in range(3):
            number = first + n
            video(root / "video" / f"name{number}.mp4", number)
            rows.append(
                {
                    "answer": ["cat", "man", "ball"][n],
                    "id": number,
                    "question": ["what runs?", "who sings?", "what is it?"][n],
                    "video_id": number,
                }
            )
        write(root / f"{split}_qa.json", rows)
    numbers = [*range(1, 4), *range(11, 14)]
    write(root / "youtube_mapping.txt", "".join(f"name{n} vid{n}\n" for n in numbers))


def nextqa(root: Path) -> None:
    head = "video,frame_count,width,height,question,answer,qid,type\n"
    places = {}
    for split, first in (("test", 100), ("train", 200)):
        rows = []
        for n, (question, answer, kind) in enumerate(
            [
                ("why did the boy run", "catch the ball", "CW"),
                ("how many dogs are there", "two", "DC"),
                ("where is this", "park", "DL"),
            ]
        ):
            places[str(first + n)] = f"11/{first + n}"
            video(root / "videos" / f"11/{first + n}.mp4", n)
            rows.append(f"{first + n},12,32,32,{question},{answer},{n},{kind}\n")
        write(root / f"{split}.csv", head + "".join(rows))
    write(root / "map_vid_vidorID.json", places)


def geneval(root: Path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "cat", "count": n}], "prompt": f"{n} cats"}
        for n in (2, 3)
    ]
    write(root / "evaluation_metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def dpgbench(root: Path) -> None:
    write(root / "prompts" / "partiprompts9.txt", "A red barn stands in a wide field.\n")


def wise(root: Path) -> None:
    rows = [{"Prompt": "Einstein's favorite instrument", "Category": "Culture", "prompt_id": 7}]
    write(root / "cultural_common_sense.json", rows)


LAYOUTS = {
    make.__name__: make
    for make in (
        coco_caption,
        vqav2,
        okvqa,
        vizwiz,
        visdial,
        coco_fid,
        mmvet,
        msvdqa,
        msrvttqa,
        nextqa,
        nocaps,
        flickr30k,
        geneval,
        dpgbench,
        wise,
    )
}
