"""
Groups of answers: many samples of one question, for which picture and question are read once.

`transformers`' generate repeats the prompt for every sample before it reads it. Here the prompt is read once, its keys
and values are repeated, and rows whose turn has ended leave the batch, so that a step costs what is still being said.
"""
import torch
import torch.nn.functional as F


def next_tokens(logits, temperature=1.0, top_p=1.0):
    """logits (R,V) -> (R,) ids: drawn from softmax(logits / temperature), cut to the likeliest tokens that together
    reach `top_p`; the likeliest one at temperature 0"""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered                   # what the likelier ones reach without this one
        probs = probs.scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probs, 1).squeeze(-1)


@torch.no_grad()
def sample_groups(model, images, questions, n, max_new_tokens, temperature=1.0, top_p=1.0):
    """images (PIL) and questions of B prompts
    -> B lists of `n` lists of token ids, as they were sampled: with the stop token at their end, unless max_new_tokens
       came first; and the sum of the entropies that they were drawn with in nats, (), at temperature 1 and uncut

    A picture that is the same object for several questions is encoded once. Randomness: torch's own generator."""
    if not questions:
        return [], torch.zeros(())
    was_training = model.training
    model.eval()  # while a model trains, gradient checkpointing takes the cache away from it
    embeds, mask = model.read_prompts(images, questions)
    out = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)           # (B*n,V)
    cache.batch_repeat_interleave(n)
    mask, position = mask.repeat_interleave(n, 0), mask.sum(-1).repeat_interleave(n, 0)
    said, rows = [[] for _ in logits], torch.arange(len(logits), device=mask.device)
    stop, words = torch.tensor(model.chat.stop_ids, device=mask.device), model.llm.get_input_embeddings()
    entropy = 0.0
    for step in range(max_new_tokens):
        logp = logits.float().log_softmax(-1)
        entropy = entropy - (logp.exp() * logp).sum()
        ids = next_tokens(logits, temperature, top_p)                                       # (R,) of those still open
        for row, token in zip(rows.tolist(), ids.tolist()):
            said[row].append(token)
        going = ~torch.isin(ids, stop)
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            ids, rows, mask, position = ids[kept], rows[kept], mask[kept], position[kept]
        mask = F.pad(mask, (0, 1), value=1)
        out = model.llm(inputs_embeds=words(ids)[:, None], attention_mask=mask, position_ids=position[:, None],
                        past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    model.train(was_training)
    return [said[at:at + n] for at in range(0, len(said), n)], entropy
