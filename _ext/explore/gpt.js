// A GPT in plain JavaScript: page 9 once more, one token at a time, with the keys and values of page 10.
(() => {
  // W x + b for the weights of a PyTorch linear layer, (outputs, inputs) row after row.
  const linear = (W, b, x) => {
    const n = x.length, y = new Float32Array(W.length / n)
    for (let i = 0, at = 0; i < y.length; i++) {
      let sum = 0
      for (let j = 0; j < n; j++) sum += W[at++] * x[j]
      y[i] = sum + (b ? b[i] : 0)
    }
    return y
  }
  const norm = (x, weight, bias) => {
    const n = x.length
    let mean = 0, square = 0
    for (const v of x) mean += v / n
    for (const v of x) square += (v - mean) ** 2 / n
    const scale = 1 / Math.sqrt(square + 1e-5)
    return x.map((v, i) => (v - mean) * scale * weight[i] + bias[i])
  }
  const gelu = x => x.map(v => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3))))
  const add = (x, y) => x.map((v, i) => v + y[i])

  llmbook.GPT = class {
    // config: as in config.json; shapes: [name, number of floats], in the order in which they lie in weights, base64 of float32
    constructor({config, shapes, weights}) {
      this.config = config
      const bytes = Uint8Array.from(atob(weights), c => c.charCodeAt(0))
      this.w = {}
      let at = 0
      for (const [name, count] of shapes) { this.w[name] = new Float32Array(bytes.buffer, at, count); at += 4 * count }
      this.reset()
    }

    reset() { this.length = 0; this.cache = Array.from({length: this.config.n_layer}, () => ({keys: [], values: []})) }

    // Read one more token: scores for the next one, and attention[block][head][place] of this one.
    read(id) {
      const {n_embd: C, n_head: H, n_layer: N} = this.config, {w} = this, D = C / H, place = this.length++
      let x = new Float32Array(C)
      for (let i = 0; i < C; i++) x[i] = w['token_embedding.weight'][id * C + i] + w['position_embedding.weight'][place * C + i]
      const attention = []
      for (let n = 0; n < N; n++) {
        const part = name => [w[`blocks.${n}.${name}.weight`], w[`blocks.${n}.${name}.bias`]]
        const qkv = linear(...part('attention.qkv'), norm(x, ...part('attention_norm')))
        const {keys, values} = this.cache[n], heads = [], context = new Float32Array(C)
        keys.push(qkv.subarray(C, 2 * C))
        values.push(qkv.subarray(2 * C))
        for (let h = 0; h < H; h++) {
          const scores = keys.map(key => { let s = 0; for (let d = h * D; d < (h + 1) * D; d++) s += qkv[d] * key[d]; return s / Math.sqrt(D) })
          const most = Math.max(...scores), powers = scores.map(s => Math.exp(s - most)), sum = powers.reduce((a, b) => a + b)
          heads.push(powers.map(p => p / sum))
          values.forEach((value, j) => { for (let d = h * D; d < (h + 1) * D; d++) context[d] += heads[h][j] * value[d] })
        }
        attention.push(heads)
        x = add(x, linear(...part('attention.projection'), context))
        x = add(x, linear(...part('feed_forward.contract'), gelu(linear(...part('feed_forward.expand'), norm(x, ...part('feed_forward_norm'))))))
      }
      this.x = x
      return {attention}
    }

    logits() { return linear(this.w['lm_head.weight'] ?? this.w['token_embedding.weight'], null, norm(this.x, this.w['final_norm.weight'], this.w['final_norm.bias'])) }

    // Scores after a row of ids, of which only the last `context_length` are read. What was read before is not read again, while it fits.
    after(ids) {
      const window = ids.slice(-this.config.context_length), fits = ids.length <= this.config.context_length
      if (!fits || !this.known || this.known.some((id, i) => id !== ids[i]) || this.known.length >= ids.length) { this.reset(); this.known = [] }
      let read
      for (const id of window.slice(this.length)) read = this.read(id)
      this.known = fits ? [...ids] : null
      return {logits: Array.from(this.logits()), attention: read.attention, start: ids.length - window.length}
    }
  }
})()
