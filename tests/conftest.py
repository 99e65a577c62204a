"""
What all tests share: one quiet thread, no network, and tiny random models of every family, saved as a hub download would lie there.

Every weight is drawn anew (no zero biases, no unit gains), so that a layer that is left out or taken twice shows in the numbers.
The configs ask for dropout and the Qwen2 has the generation defaults of a real instruct model: traps that real weights bring along.
"""
import atexit
import os
import shutil
import socket
import sys
import tempfile

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HOME=tempfile.mkdtemp(prefix="nanopivot-hf-"))
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config,
                          Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SiglipConfig,
                          SiglipImageProcessor, SiglipModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTForImageClassification,
                          ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, ViTModel)

import model as model_file
import scenes


def refuse(self, address, connect=socket.socket.connect):
    """Every connection of the test process that leaves this machine is an error"""
    if isinstance(address, tuple) and address[0] not in ("localhost", "127.0.0.1", "::1"):
        raise AssertionError(f"a test wanted the network: {address}")
    return connect(self, address)


def pytest_collection_modifyitems(items):
    """The longest first: it would keep one core busy when all else is done"""
    items.sort(key=lambda item: not item.name.startswith(("test_speedrun", "test_stopped_on_two", "test_the_drawn_world_end_to_end")))


socket.socket.connect = refuse
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# ---- vision encoders -----------------------------------------------------------------------------------------------------

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
            bos_token_id=0, eos_token_id=1, pad_token_id=2)
DINO = {**SHAPE, "image_size": 40, "hidden_dropout_prob": .2, "attention_probs_dropout_prob": .2, "drop_path_rate": .2}  # crops are smaller
MAE = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16)
VIT = {**SHAPE, "image_size": 24, "hidden_dropout_prob": .2, "attention_probs_dropout_prob": .2}
HALF = {**SHAPE, "image_size": 24, "attention_dropout": .2}
SQUARE = dict(size={"height": 24, "width": 24})
CROP = dict(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24})  # CLIP and DINOv2: short edge, then a centre crop

VISION = {  # name -> (model, image processor); the factories are called once a test session
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**HALF)), lambda: SiglipImageProcessor(**SQUARE)),
    "siglip_full": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=HALF)), lambda: SiglipImageProcessor(**SQUARE)),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**HALF)), lambda: CLIPImageProcessor(**CROP)),
    "clip_full": (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=HALF, projection_dim=16)), lambda: CLIPImageProcessor(**CROP)),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO)), lambda: BitImageProcessor(**CROP)),
    "dinov2_with_registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO)), lambda: BitImageProcessor(**CROP)),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**VIT)), lambda: ViTImageProcessor(**SQUARE)),
    "vit_pooler": (lambda: ViTModel(ViTConfig(**VIT)), lambda: ViTImageProcessor(**SQUARE)),
    "vit_mae": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**VIT, **MAE)), lambda: ViTImageProcessor(**SQUARE)),
}


def randomise(module, std):
    """Every weight a normal number; gains around 1, so that nothing dies out or explodes"""
    for name, parameter in module.named_parameters():
        gain = parameter.ndim == 1 and name.endswith("weight") or name.endswith("lambda1")
        torch.nn.init.normal_(parameter, mean=float(gain), std=std)
    return module


@pytest.fixture(scope="session")
def vision_dirs(tmp_path_factory):
    """{name: folder} of all vision encoders"""
    folders = {}
    for seed, (name, (make_model, make_processor)) in enumerate(VISION.items()):
        torch.manual_seed(seed)
        folders[name] = str(tmp_path_factory.mktemp(name))
        randomise(make_model(), .2).save_pretrained(folders[name])
        make_processor().save_pretrained(folders[name])
    return folders


# ---- tokenizers and LLMs --------------------------------------------------------------------------------------------------

SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
           "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
           "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
          "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
          "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
          "{% if loop.index0 == 0 and system_message != false %}"
          "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
          "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
          "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
          "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZERS = {  # name -> (chat template, special tokens, eos, pad, bos): as the real tokenizers have them
    "chatml": (scenes.CHATML, CHATML_TOKENS, "<|im_end|>", "<|endoftext|>", None),
    "qwen3": (QWEN3, CHATML_TOKENS, "<|im_end|>", "<|endoftext|>", None),
    "smollm2": (SMOLLM2, CHATML_TOKENS, "<|im_end|>", "<|im_end|>", "<|im_start|>"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               "<|end_of_text|>", None, "<|begin_of_text|>"),  # turns end with another token than texts, and nothing is for padding
    "llama2": (LLAMA2, ["<unk>", "<s>", "</s>"], "</s>", None, "<s>"),
}
WORDS = [text for i in range(60) for row in [scenes.Scenes("train", 60, "foreign")[i]] for text in (row["question"], row["chosen"], row["rejected"])]


def make_tokenizer(name):
    template, special, eos, pad, bos = TOKENIZERS[name]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if name.startswith("llama"):  # plain encoding adds a BOS, as Llama's does; the template writes its own
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    if name == "qwen3":
        bpe.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad, bos_token=bos, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


LLM = {  # name -> (tokenizer, model class, config class, what is special in its config)
    "qwen2": ("chatml", Qwen2ForCausalLM, Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", Qwen3ForCausalLM, Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),  # 4 heads of 16 are not the width of 32
    "llama": ("llama3", LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=False)),
    "smollm2": ("smollm2", LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
}


@pytest.fixture(scope="session")
def tokenizers():
    """{name: tokenizer} with the chat templates of five families"""
    return {name: make_tokenizer(name) for name in TOKENIZERS}


@pytest.fixture(scope="session")
def llm_dirs(tmp_path_factory, tokenizers):
    """{name: folder} of all LLMs"""
    folders = {}
    for seed, (name, (tokenizer, model_class, config_class, extra)) in enumerate(LLM.items()):
        torch.manual_seed(seed)
        tokenizer, folders[name] = tokenizers[tokenizer], str(tmp_path_factory.mktemp(name))
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        llm = model_class(config_class(vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, attention_dropout=.2,
                                       bos_token_id=None, eos_token_id=eos, pad_token_id=pad, **extra))
        randomise(llm, .25)
        if name == "qwen2":  # what Qwen2.5-Instruct ships, its penalty (1.1) made stronger
            llm.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.5, temperature=.7, top_p=.8, top_k=20,
                                                     eos_token_id=[eos, pad], pad_token_id=pad)
        llm.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


# ---- whole models and pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make(vision_dirs, llm_dirs):
    """make(vision, llm, feature_layer, pool) -> a fresh MLLM in eval mode; the same arguments give the same weights"""
    def make(vision="siglip", llm="qwen2", feature_layer=-2, pool=1):
        torch.manual_seed(0)
        return model_file.MLLM.from_pretrained(vision_dirs[vision], llm_dirs[llm], feature_layer, pool).eval()
    return make


@pytest.fixture(scope="session")
def pictures():
    """Four noisy pictures of different sizes and shapes"""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((24, 24), (40, 30), (30, 50), (64, 64))]


@pytest.fixture(scope="session")
def start_run(make, tmp_path_factory):
    """A run directory to train from: SigLIP + Qwen2"""
    run = str(tmp_path_factory.mktemp("runs") / "start")
    make().save(run)
    return run
