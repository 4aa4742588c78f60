"""A transformer block of your own on two processes: torchrun --nproc-per-node 2 FILE"""

import torch
from transformers.models.llama import modeling_llama as llama

import commfuse
from commfuse.nn import KVCache, ParallelBlock
from commfuse.ops import Placement

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
config = llama.LlamaConfig(**sizes, intermediate_size=160, attn_implementation="sdpa")
whole = llama.LlamaDecoderLayer(config, layer_idx=0).requires_grad_(False)
x, places = torch.randn(5, 96), torch.arange(5)
rotary = llama.LlamaRotaryEmbedding(config)
angles = torch.outer(places, rotary.inv_freq)

with commfuse.init_mesh(tp=torch.distributed.get_world_size()) as mesh:
    with torch.device("meta"):  # no weights yet
        block = ParallelBlock.from_block(llama.LlamaDecoderLayer(config, 0), mesh.tp)
    block.load_state_dict(whole.state_dict())  # each rank takes its part of the whole tensors
    cache = KVCache(1, 1, len(block.self_attn.shard.kv), 16, 16, x.dtype).layers[0]
    placement = Placement(places * 0, places, (angles.cos(), angles.sin()))
    _, residual = block(block.input_layernorm(x), x, cache, placement, torch.ones(96))
    expected = whole(x[None], position_embeddings=rotary(x, places[None]))[0]
    error = (residual - expected).abs().max().item()
    if mesh.tp.rank == 0:
        print(f"{mesh.tp.world_size} ranks, largest difference {error:.1e}")
torch.distributed.destroy_process_group()
