"""The tasks that a job's model may be for: a job file is checked against them, executors load by them."""

from __future__ import annotations

import difflib

#: task -> class in transformers. All models are trained in fp32; mixed precision is the job's affair.
TASKS = {
    "audio-classification": "AutoModelForAudioClassification",
    "audio-frame-classification": "AutoModelForAudioFrameClassification",
    "audio-tokenization": "AutoModelForAudioTokenization",
    "audio-x-vector": "AutoModelForAudioXVector",
    "causal-lm": "AutoModelForCausalLM",
    "ctc": "AutoModelForCTC",
    "depth-estimation": "AutoModelForDepthEstimation",
    "document-question-answering": "AutoModelForDocumentQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForImageSegmentation",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-to-image": "AutoModelForImageToImage",
    "instance-segmentation": "AutoModelForInstanceSegmentation",
    "keypoint-detection": "AutoModelForKeypointDetection",
    "keypoint-matching": "AutoModelForKeypointMatching",
    "mask-generation": "AutoModelForMaskGeneration",
    "masked-image-modeling": "AutoModelForMaskedImageModeling",
    "masked-lm": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "next-sentence-prediction": "AutoModelForNextSentencePrediction",
    "object-detection": "AutoModelForObjectDetection",
    "pre-training": "AutoModelForPreTraining",
    "question-answering": "AutoModelForQuestionAnswering",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "table-question-answering": "AutoModelForTableQuestionAnswering",
    "text-encoding": "AutoModelForTextEncoding",
    "text-to-spectrogram": "AutoModelForTextToSpectrogram",
    "text-to-waveform": "AutoModelForTextToWaveform",
    "time-series-prediction": "AutoModelForTimeSeriesPrediction",
    "token-classification": "AutoModelForTokenClassification",
    "universal-segmentation": "AutoModelForUniversalSegmentation",
    "video-classification": "AutoModelForVideoClassification",
    # transformers 5 has one class for all models that read images and write text
    "vision2seq": "AutoModelForImageTextToText",
    "visual-question-answering": "AutoModelForVisualQuestionAnswering",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "zero-shot-object-detection": "AutoModelForZeroShotObjectDetection",
}

#: spellings found in job files written for the Rust Hypha
ALIASES = {
    "seq2-seq-lm": "seq2seq-lm",
    "seq-2-seq-lm": "seq2seq-lm",
    "speech-seq2-seq": "speech-seq2seq",
    "speech-seq-2-seq": "speech-seq2seq",
    "vision-2-seq": "vision2seq",
    "vision2-seq": "vision2seq",
    "vison2-seq": "vision2seq",
    "audio-xvector": "audio-x-vector",
}

#: tasks of which transformers finds the loss by ``problem_type``, or, without that, by the labels
ONE_LABEL_A_ROW = frozenset(
    ("sequence-classification", "image-classification", "audio-classification", "video-classification")
)
#: tasks with a class for each token, or pixel
A_LABEL_A_PLACE = frozenset(("token-classification", "semantic-segmentation", "image-segmentation"))
#: the label that a loss leaves out
IGNORED = -100


def task_of(architectures: object) -> str | None:
    """The task of the models that config.json names as its ``architectures``; ``None``: not plain."""
    ends = {name.removeprefix("AutoModel"): task for task, name in TASKS.items()} | {
        "LMHeadModel": "causal-lm"
    }
    for name in architectures if isinstance(architectures, list) else []:
        for end, task in ends.items():
            if isinstance(name, str) and name.endswith(end):
                return task
    return None


def unknown_task(task: str) -> str | None:
    """What is wrong with the name of a task, and what may have been meant; ``None`` if it is known."""
    if task == "torch" or ALIASES.get(task, task) in TASKS:
        return None
    if near := difflib.get_close_matches(task, [*TASKS, "torch"], n=1, cutoff=0.6):
        return f"there is no task {task}; did you mean {near[0]}?"
    return f"there is no task {task}; known are torch, {', '.join(TASKS)}"
