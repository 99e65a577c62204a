"""
One prefix, many branches: how responses that share a picture are read in one sequence.

Both answers of a preference pair follow the same picture and the same question, and often one picture has several
questions. Written one below the other, each response would bring its own copy of the picture, which is nearly all of
the tokens. So everything about one picture is packed as one sequence instead, a tree:

    [picture | question 1 | chosen 1 | rejected 1 | question 2 | chosen 2 | rejected 2 | ...]

The picture is encoded and attended to once. A mask keeps branches apart: a token sees its own branch and what that
branch grew from. Positions start again where a branch starts. So for the LLM nothing has changed, and the gradients of
all branches add up in the part that they share. A preference pair is a question with two responses, a GRPO group one
with many, and several SFT questions about a picture are branches with one response each.

Sharing a prefix between two responses is known from text-only DPO (Wang & Hegde 2024, arXiv 2410.20305).
"""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Batch:
    """What one forward pass needs: trees of tokens, packed into S rows of T tokens. `pack` makes it."""
    pixels: torch.Tensor        # (I,3,H,W)
    input_ids: torch.Tensor     # (S,T) -1-n stands for image token n of all I*N
    positions: torch.Tensor     # (S,T) how many tokens precede this one on its own path from the picture
    branch_end: torch.Tensor    # (S,T) the first column that can no longer see this token
    logit_at: torch.Tensor      # (M,) index into S*T: the token whose logits predict this response token
    targets: torch.Tensor       # (M,) the id of that response token
    response_of: torch.Tensor   # (M,) and which of the R responses it belongs to
    n_responses: int            # R
    rows: tuple = ()            # (row number, fingerprint of all that the model reads of it), one a record

    def visible(self):
        """(S,1,T,T) bool, [query, key]: a token sees itself and what came before, unless that branch has ended.

            picture   x                 one row of a question with two responses: rejected sees the picture
            question  x x               and the question, and not a word of chosen
            chosen    x x x
            rejected  x x . x"""
        at = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return ((at <= at[:, None]) & (at[:, None] < self.branch_end[:, None]))[:, None]

    def per_response(self, values):
        """values (M,) of response tokens -> (R,) their sums"""
        return torch.zeros(self.n_responses, device=values.device).index_add(0, self.response_of, values)

    def _each(self, change):
        return Batch(*(change(value) if torch.is_tensor(value) else value for value in vars(self).values()))

    def to(self, device):
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """Called by DataLoader: pinned memory is copied to a GPU while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())


def pack(trunks, trees, pixels, pad_id):
    """Lays trees out as rows of equal length.

    trunks: ids of what a tree's questions share, for each tree (`Chat.trunk_ids`, which names its picture)
    trees: for each tree a list of (question ids, [response ids, ...])
    pixels (I,3,H,W): the pictures, each encoded once, however many trees name it

        trunk [5 -1 6], question [7], responses [8 9] and [8 3]  ->  input_ids   5 -1  6  7  8  9  8  3
                                                                     positions   0  1  2  3  4  5  4  5
                                                                     branch_end  8  8  8  8  6  6  8  8

    A row is as long as the largest tree; smaller trees share one (first fit, largest first), so that little is padded.
    Responses are numbered in the order in which they are given, wherever they end up."""
    sizes = [len(trunk) + sum(len(question) + sum(map(len, responses)) for question, responses in tree)
             for trunk, tree in zip(trunks, trees, strict=True)]
    T, room, place = max(sizes), [], {}                                 # room: free tokens of each row
    for t in sorted(range(len(trees)), key=lambda t: -sizes[t]):
        s = next((s for s, free in enumerate(room) if free >= sizes[t]), len(room))
        if s == len(room):
            room.append(T)
        place[t] = s, T - room[s]
        room[s] -= sizes[t]

    input_ids, positions = np.full((len(room), T), pad_id), np.zeros((len(room), T), dtype=np.int64)
    branch_end = np.tile(np.arange(1, T + 1), (len(room), 1))           # padding sees itself: softmax needs a key
    logit_at, targets, response_of, n_responses = [], [], [], 0

    def write(ids, s, at, position, end):
        to = slice(at, at + len(ids))
        input_ids[s, to], branch_end[s, to] = ids, end
        positions[s, to] = np.arange(position, position + len(ids))
        return at + len(ids)

    for t, (trunk, tree) in enumerate(zip(trunks, trees)):
        s, start = place[t]
        at = write(trunk, s, start, 0, start + sizes[t])
        for question, responses in tree:
            depth = len(trunk) + len(question)
            at = write(question, s, at, len(trunk), at + len(question) + sum(map(len, responses)))
            last = s * T + at - 1                                       # it predicts the first token of every response
            for response in responses:
                logit_at += [last, *range(s * T + at, s * T + at + len(response) - 1)]
                targets += response
                response_of += [n_responses] * len(response)
                at = write(response, s, at, depth, at + len(response))
                n_responses += 1
    return Batch(pixels, *map(torch.from_numpy, (input_ids, positions, branch_end)),
                 *(torch.tensor(numbers, dtype=torch.int64) for numbers in (logit_at, targets, response_of)),
                 n_responses)


def cut(trees, size):
    """Yields consecutive trees in lists of at most `size` rows; a larger tree is split"""
    part, n = [], 0
    for tree in (tree[at:at + size] for tree in trees for at in range(0, len(tree), size)):
        if n + len(tree) > size:
            yield part
            part, n = [], 0
        part.append(tree)
        n += len(tree)
    if part:
        yield part
