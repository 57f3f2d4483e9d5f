"""The models of `tests.bench.gpu` in PyTorch: transformers' own, the same shapes."""

import numpy as np
import torch
import transformers

from t5x_lite.config import ModelConfig
from t5x_lite.interop import t5
from tests.bench.train import OPTIM


def _t5(cfg: ModelConfig, batch: dict):
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**t5.hf_config(cfg))
    )
    if not cfg.tie_embeddings:  # transformers 5 ties the head whatever the config says
        head = torch.randn_like(model.shared.weight) * cfg.d_model**-0.5
        model.lm_head.weight = torch.nn.Parameter(head)
    return model, dict(
        input_ids=batch["encoder"]["tokens"],
        decoder_input_ids=batch["decoder"]["tokens"],
        labels=batch["decoder"]["targets"],
        use_cache=False,
    )


def _bert(cfg: ModelConfig, batch: dict):
    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.d_ff,
            max_position_embeddings=cfg.max_positions,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.dropout,
        )
    )
    main = batch["main"]
    labels = np.full_like(main["tokens"], -100)
    np.put_along_axis(labels, main["places"], main["targets"], axis=1)
    return model, dict(
        input_ids=main["tokens"],
        token_type_ids=main["types"],
        labels=labels,
        next_sentence_label=main["labels"],
    )


def _gpt2(cfg: ModelConfig, batch: dict):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=cfg.vocab_size,
            n_embd=cfg.d_model,
            n_layer=cfg.depth,
            n_head=cfg.heads,
            n_inner=cfg.d_ff,
            n_positions=cfg.max_positions,
            resid_pdrop=cfg.dropout,
            embd_pdrop=cfg.dropout,
            attn_pdrop=cfg.dropout,
        )
    )
    main = batch["main"]
    # It shifts the labels itself: the same number of products.
    labels = np.where(main["weights"] > 0, main["tokens"], -100)
    given = dict(input_ids=main["tokens"], labels=labels, use_cache=False)
    if cfg.structure == "prefix_lm":
        ranks_BT = main["ranks"]
        given["attention_mask"] = (ranks_BT[:, None] <= ranks_BT[:, :, None])[:, None]
    return model, given


def peer(cfg: ModelConfig, batch: dict) -> tuple[torch.nn.Module, dict]:
    """transformers' model of the shape `cfg`, and its arguments for the same batch."""
    if cfg.structure == "encoder_decoder":
        model, given = _t5(cfg, batch)
    elif cfg.structure == "encoder":
        model, given = _bert(cfg, batch)
    else:
        model, given = _gpt2(cfg, batch)
    tensors = {}
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            kind = torch.bool if value.dtype == bool else torch.long
            value = torch.tensor(value, dtype=kind)
        tensors[name] = value
    return model.train(), tensors


class Theirs:
    """transformers' model and PyTorch's fused AdamW, bfloat16 autocast.

    As the other side in `tests.bench.gpu`: `step` does not wait, `loss` does.

    Args:
      mode: "compile" (torch.compile) or "eager".
    """

    def __init__(self, cfg: ModelConfig, batch: dict, mode: str):
        if mode not in ("compile", "eager"):
            raise ValueError(f"torch:{mode}: allowed are torch:compile, torch:eager.")
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        torch.manual_seed(0)
        model, given = peer(cfg, batch)
        model.to(self.device)
        move = torch.Tensor.to
        self.given = {
            k: move(v, self.device) if torch.is_tensor(v) else v
            for k, v in given.items()
        }
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=OPTIM["learning_rate"],
            betas=(OPTIM["beta1"], OPTIM["beta2"]),
            eps=OPTIM["eps"],
            weight_decay=OPTIM["weight_decay"],
            fused=True,
        )
        self.detail = dict(
            attention=model.config._attn_implementation,
            parameters=sum(p.numel() for p in model.parameters()),
            kind=torch.cuda.get_device_name() if self.cuda else "cpu",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version() if self.cuda else None,
        )
        self.model = torch.compile(model) if mode == "compile" else model

    def step(self):
        with torch.autocast(self.device, dtype=torch.bfloat16):
            self.last = self.model(**self.given).loss
        self.optimizer.zero_grad()
        self.last.backward()
        self.optimizer.step()

    def loss(self):
        return float(self.last.detach())

    def peak_bytes(self):
        return torch.cuda.max_memory_allocated() if self.cuda else None
