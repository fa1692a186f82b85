"""Small random LLaVA checkpoints and a folder of real photographs, built inside the tests.

Two shapes: ``build_tiny_llava`` (28 px, 4 image tokens, byte-level BPE) for anything that only
needs a LLaVA, and ``build_llava15`` (336 px, patch 14, 576 image tokens, Llama's metaspace BPE with
byte fallback, the public chat template, padded vocabulary): LLaVA-1.5 in everything but width.
Both are saved under the weight names of the public llava-1.5 checkpoints.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SENTENCES = (
    "The image features a dog sitting on a couch, a cat, and a ball.",
    "There is a small red star above the blue square, next to a green moon.",
    "A man in a white shirt is standing on the left side of the street, holding an umbrella.",
    "In the background, there are several cars parked along the road, and a traffic light.",
    "USER: Describe this image in detail. ASSISTANT: The scene shows a cup of coffee on a table.",
    "Statement: There is a wooden spoon. Is this statement right according to the image? Yes. No.",
)

# The template that the public llava-1.5 checkpoints carry, images first.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] in ('image', 'image_url') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_BOS_FIRST = processors.TemplateProcessing(  # "<s>" has id 1 in both tokenizers
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
)

PHOTOS = {  # file written -> file shipped in scikit-image's wheel
    "astronaut.jpg": "astronaut.png",
    "coffee.jpg": "coffee.png",
    "cat.png": "chelsea.png",
    "rocket.jpg": "rocket.jpg",
    "motorcycle.jpg": "motorcycle_left.png",
    "cameraman.png": "camera.png",
}


def build_tiny_llava(directory: Path, *, width: int = 32, seed: int = 0) -> Path:
    """Write a LLaVA of about 50k parameters: 28 px images, 4 image tokens, hidden 32, 2 layers."""
    tokenizer = byte_level_tokenizer()
    config = _config(tokenizer, len(tokenizer), width=width, image_size=28, max_length=512)
    return _save(directory, config, tokenizer, seed)


def build_llava15(directory: Path, *, seed: int = 0) -> Path:
    """Write a narrow LLaVA-1.5: 336 px, patch 14, 576 image tokens, hidden 64, 2 layers.

    As in the public checkpoints the embedding has more rows than the tokenizer has tokens. With
    random weights such rows are sampled too, and vLLM returns their log-probs only undecoded
    (``detokenize=False``).
    """
    tokenizer = llama_tokenizer()
    rows = -(-len(tokenizer) // 64) * 64
    config = _config(tokenizer, rows, width=64, image_size=336, max_length=4096)
    return _save(directory, config, tokenizer, seed)


def write_photos(directory: Path) -> Path:
    """Write real photographs (JPEG and PNG, colour and grey) and their ``prompts.jsonl``."""
    import skimage  # here, so that GPU machines can run tests/gpu without it

    directory.mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    rows = []
    for name, shipped in PHOTOS.items():
        with Image.open(source / shipped) as picture:
            picture.save(directory / name)
        row = {"id": Path(name).stem, "image": name, "prompt": "Describe this image in detail."}
        rows.append(json.dumps(row))
    (directory / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with BOS put first: any text survives a round trip."""
    specials = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = _BOS_FIRST
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def llama_tokenizer() -> LlamaTokenizer:
    """Train a Llama tokenizer: metaspace BPE, byte fallback, ``<pad>`` and ``<image>`` last."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate([*fixed, *pieces])},
        merges=[tuple(merge) for merge in trained["merges"]],
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        padding_side="left",
    )
    tokenizer.backend_tokenizer.post_processor = _BOS_FIRST
    return tokenizer


def _config(
    tokenizer: PreTrainedTokenizerFast, rows: int, *, width: int, image_size: int, max_length: int
) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=0.2,  # the default 0.02 makes so narrow a model almost uniform
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
        tie_word_embeddings=False,
    )


def _save(
    directory: Path, config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    _restore_public_names(directory / "model.safetensors")
    size = config.vision_config.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return directory


def _restore_public_names(weights: Path) -> None:
    """Put back ``vision_model.``, which transformers 5 leaves out on saving and vLLM insists on."""
    tower = "vision_tower."
    renamed = {
        f"{tower}vision_model.{name.removeprefix(tower)}" if name.startswith(tower) else name: value
        for name, value in load_file(weights).items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})
