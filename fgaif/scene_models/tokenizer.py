"""The tiny models' byte-level BPE tokenizer, chat template and LLaVA processor.

Every word of the embedded world is one token; any other text still encodes, byte by byte.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from fgaif.data.scenes.draw import CELL, IMAGE_SIZE
from fgaif.data.scenes.world import COLOURS, NOUNS, RELATIONS, SIZES

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID = range(len(SPECIALS))
PATCHES = (IMAGE_SIZE // CELL) ** 2

_LATER_WORDS = (
    *NOUNS,
    *COLOURS,
    *SIZES,
    *RELATIONS,
    *[
        "There",
        "is",
        "a",
        "from",
        "the",
        "From",
        "this",
        "image",
        "in",
        "detail",
        "right",
        "where",
        "it",
        "This",
        "simple",
        "picture",
        "The",
    ],
    *[
        "background",
        "plain",
        "Describe",
        "Statement",
        "Prompt",
        "Is",
        "Where",
        "What",
        "yes",
        "no",
        "ASSISTANT",
        "an",
    ],
)
_FIRST_WORDS = ("USER", "Describe", "Statement", "Prompt", "Is", "What", "Where", "From", "There")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} ASSISTANT:"
    "{% else %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %}{% endif %}"
    "</s>"
    "{% endif %}"
    "{% endfor %}"
)


def chat_prompt(question: str) -> str:
    """Return the single-turn prompt text, without BOS: ``USER: <image>\\n... ASSISTANT:``."""
    return f"USER: <image>\n{question} ASSISTANT:"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer: 256 bytes, the world's words, BOS put first as Llama does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = [f" {word}" for word in dict.fromkeys(_LATER_WORDS)] + list(_FIRST_WORDS)
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor: 72-pixel images scaled to [-1, 1], the tokenizer, the template."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
