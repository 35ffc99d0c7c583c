"""The formulas of reference/'s docstrings in LaTeX, as tools/docs/formula.py reads it."""

# File of reference/ -> for each indented block of its docstring, in order: the lines, or () to leave it as plain text.
# A test compares the names in the lines with those of the block.
FORMULAS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention": (
        (
            r"score_{i,h,j} & = scale \cdot \sum_{d} \, query_{i,h,d} \cdot key_{j,\lfloor h/G \rfloor,d}",
            r"weight_{i,h,j} & = \dfrac{\exp(score_{i,h,j})}{\sum_{j'} \exp(score_{i,h,j'})}"
            " & over every j' that query i sees",
            r"output_{i,h,d} & = \sum_{j} \, weight_{i,h,j} \cdot value_{j,\lfloor h/G \rfloor,d}"
            " & over the j that query i sees",
            r"i\ sees\ j & \Leftrightarrow\; j \leq k_len - q_len + i & query i, key j",
        ),
    ),
    "packing": (
        (
            r"cu_seqlens_{b} & = \sum_{b' < b} length_{b'} & so the first is 0",
            r"sequence_{b} & = packed\,[\,cu_seqlens_{b} : cu_seqlens_{b+1}\,]",
        ),
    ),
    "slot_mapping": (
        (
            r"b & = block_table\,[\,\lfloor position\,/\,block_size \rfloor\,]",
            r"slot & = b \cdot block_size + position\ mod\ block_size",
        ),
    ),
    "store_kvcache": (
        (
            r"k_cache\,[\,\lfloor slot_{i}\,/\,block_size \rfloor,\; slot_{i}\ mod\ block_size\,] & = key_{i}"
            " & for every"
            " token i whose slot is not -1",
            r"v_cache\,[\,\lfloor slot_{i}\,/\,block_size \rfloor,\; slot_{i}\ mod\ block_size\,] & = value_{i}",
            r"slot_{i} & = slot_mapping_{i}",
        ),
    ),
    "paged_attention": (
        (
            r"slots_{b} & = slot_mapping(0 \ldots context_lens_{b} - 1,\; block_tables_{b})",
            r"output_{b} & = attention(queries_{b},\; k_cache\,[slots_{b}],\; v_cache\,[slots_{b}])"
            " & for the queries of sequence b",
        ),
        (),
    ),
    "linear": ((r"y_{t,n} & = \sum_{k} \, x_{t,k} \cdot weight_{n,k} + bias_{n}",),),
    "shared_prefix_attention": (
        (
            r"(output_p,\, lse_p) & = attention(query,\; shared\ keys) & lse is log(sum over keys of exp(score))",
            r"(output_s,\, lse_s) & = attention(query,\; own\ keys)",
            r"output & = \dfrac{e^{lse_p} \, output_p + e^{lse_s} \, output_s}{e^{lse_p} + e^{lse_s}}",
        ),
    ),
    "rms_norm": (
        (
            r"rms(x) & = \sqrt{\dfrac{x_{0}^{2} + \ldots + x_{E-1}^{2}}{E} + eps}",
            r"y_{e} & = \dfrac{x_{e}}{rms(x)} \cdot weight_{e}",
        ),
    ),
    "rotary_embedding": (
        (
            r"angle_{i} & = position \cdot inv_freq_{i} & for i in 0 .. D/2 - 1",
            r"y_{i} & = a \, (x_{i} \cos(angle_{i}) - x_{i+D/2} \, \sin(angle_{i}))",
            r"y_{i+D/2} & = a \, (x_{i} \, \sin(angle_{i}) + x_{i+D/2} \, \cos(angle_{i}))",
            r"inv_freq_{i} & = theta^{-2i/D} \, \left( keep_{i} + \dfrac{1 - keep_{i}}{factor} \right)",
        ),
        (
            r"default & keep_{i} = 1",
            r"linear & keep_{i} = 0 & simple, but neighbours blur",
            r"llama3 & keep_{i} = \dfrac{turns_{i} - low_freq_factor}{high_freq_factor - low_freq_factor}"
            " & within 0 .. 1",
            r"yarn & keep_{i}\ falls\ linearly & from 1, where turns = beta_fast, to 0, where turns = beta_slow",
        ),
    ),
    "silu_and_mul": (
        (
            r"silu(g) & = \dfrac{g}{1 + e^{-g}}",
            r"y_{f} & = silu(x_{f}) \cdot x_{f+F} & for f in 0 .. F - 1",
        ),
    ),
    "moe": (
        (
            r"probability_{t} & = softmax_{n} \, (router_{n} \cdot x_{t})",
            r"weight_{t,n} & = probability_{t,n} & if n is among the top_k most probable experts of token t, else 0",
            r"weight_{t} & \leftarrow \dfrac{weight_{t}}{\sum_{n} weight_{t,n}} & if norm_topk_prob",
            r"y_{t} & = \sum_{n} \, weight_{t,n} \; down_{n} \cdot silu_and_mul(gate_up_{n} \cdot x_{t})",
        ),
    ),
    "tensor_parallel": (
        (
            r"column\ parallel & y = [\, x W_{0}' + b_{0} \;|\; x W_{1}' + b_{1} \;|\; \ldots \,]"
            " & rank r has some of the outputs: rows of W and b",
            r"row\ parallel & y = x_{0} W_{0}' + x_{1} W_{1}' + \ldots + b"
            " & rank r has some of the inputs: columns of W",
            r"vocabulary & y = \sum_{r} \, row_{r}"
            " & the token's row from the one rank whose range holds it, 0 from all others",
        ),
    ),
    "philox": (
        (
            r"2^{32}\, hi0 + lo0 & = 0xD2511F53 \cdot c0",
            r"2^{32}\, hi1 + lo1 & = 0xCD9E8D57 \cdot c2",
            r"(c0, c1, c2, c3) & \rightarrow (hi1 \oplus c1 \oplus k0,\; lo1,\; hi0 \oplus c3 \oplus k1,\; lo0)"
            " & one round of ten",
            r"(k0, k1) & \rightarrow (k0 + 0x9E3779B9,\; k1 + 0xBB67AE85)\ mod\ 2^{32} & between two rounds",
        ),
    ),
    "sampling": (
        (
            r"z & = \dfrac{logits}{temperature}",
            r"top_k & z_{v} \geq z_{(k)} & keeps v if z is at least the k-th largest",
            r"top_p & \sum_{w:\; p_{w} > p_{v}} p_{w} < top_p & keeps v; p is the softmax of what top_k left",
            r"min_p & p_{v} \geq min_p \cdot max\; p & keeps v",
            r"token & = argmax_{v} \; (z_{v} - \log e_{v}) & over the v that were kept",
            r"e_{v} & = -\log(1 - u_{v}) & u uniform on (0, 1)",
        ),
    ),
    "transformer": (
        (
            r"x & = embed\,[token]",
            r"h & = rms_norm(x) & in each layer",
            r"q,\, k & = rope(norm(q_proj \cdot h)),\; rope(norm(k_proj \cdot h))",
            r"x & \leftarrow x + o_proj \cdot attention(q,\, k,\, v_proj \cdot h)",
            r"x & \leftarrow x + feed_forward(rms_norm(x))"
            " & feed_forward is down . silu_and_mul(gate, up), or a mixture",
            r"logits & = lm_head \cdot rms_norm(x)",
        ),
    ),
    "generate": (
        (
            r"logits & = transformer(tokens)\,[last]",
            r"token & = sampling(logits)",
            r"tokens & = tokens + [token]"
            " & until the token ends the text (stop), or max_tokens or max_model_len is reached (length)",
        ),
    ),
    "block_hash": (
        (
            r"block_hash(tokens,\, parent) & = xxh64(parent \;\Vert\; tokens_{0} \;\Vert\; tokens_{1} \;\Vert\; \ldots)"
            " & 8 bytes each,"
            " little-endian; no parent for a first block",
        ),
    ),
    "block_manager": (
        (
            r"ref_count(block) & = |\{\, sequences : block \in table \,\}|",
            r"free & = blocks - \cup\; table",
            r"hits(tokens) & = the\ longest\ run"
            " & of full blocks, from the start, whose whole prefix some block holds already",
            r"cached & = min(|hits| \cdot block_size,\; |tokens| - 1)",
            r"to\ be\ taken & = blocks - hits & blocks for all tokens, without the hits that another sequence owns;"
            " at most as many as are free, or it does not fit",
        ),
    ),
}
