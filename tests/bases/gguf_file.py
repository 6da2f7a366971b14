"""Writes a small GGUF file as llama.cpp's converter does: a Llama with random weights."""

import torch
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt", "he"]


def write_gguf(path, chat_template=None, architecture="llama", leave_out=(), padding=True):
    """Write the file and return the model that is in it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(
        [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in VOCABULARY]
    )
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if padding:
        writer.add_pad_token_id(0)
    if chat_template:
        writer.add_chat_template(chat_template)
    for name, tensor in _tensors(model).items():
        if name not in leave_out:
            writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(model):
    """The weights under GGUF's names."""
    config, layer = model.config, model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "blk.0.attn_norm.weight": layer.input_layernorm.weight,
        "blk.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "blk.0.attn_q.weight": _permuted(attention.q_proj.weight, config.num_attention_heads),
        "blk.0.attn_k.weight": _permuted(attention.k_proj.weight, config.num_key_value_heads),
        "blk.0.attn_v.weight": attention.v_proj.weight,
        "blk.0.attn_output.weight": attention.o_proj.weight,
        "blk.0.ffn_gate.weight": mlp.gate_proj.weight,
        "blk.0.ffn_up.weight": mlp.up_proj.weight,
        "blk.0.ffn_down.weight": mlp.down_proj.weight,
    }


def _permuted(weight, heads):
    """llama.cpp turns neighbouring pairs of a head's values where transformers turns its halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
