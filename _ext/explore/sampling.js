// Three sliders over the scores of one next token.
// As llmbook.generate.next_probabilities: temperature, then top-k, then top-p.
llmbook.nextProbabilities = (logits, temperature, topK = Infinity, topP = 1) => {
  const best = Math.max(...logits), first = logits.indexOf(best)
  if (temperature === 0) return logits.map((_, i) => +(i === first))
  let scores = logits.map(z => (z - best) / temperature)
  if (topK < logits.length) {
    const least = [...scores].sort((a, b) => b - a)[topK - 1]
    scores = scores.map(z => z < least ? -Infinity : z)
  }
  const softmax = row => { const powers = row.map(Math.exp), sum = powers.reduce((a, b) => a + b); return powers.map(p => p / sum) }
  if (topP < 1) {
    const shares = softmax(scores), order = shares.map((_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b)
    let before = 0
    for (const i of order) {
      if (before >= topP * (1 - 1e-9)) scores[i] = -Infinity
      before += shares[i]
    }
  }
  return softmax(scores)
}

llmbook.bars = (names, shares, mark = -1) => llmbook.make('ol', {class: 'llm-bars'}, ...names.map((name, i) => llmbook.make('li', {'data-mark': i === mark},
  llmbook.make('code', {}, name), llmbook.make('span', {class: 'llm-bar', style: `--llm-weight: ${shares[i]}`}), llmbook.make('small', {}, llmbook.percent(shares[i]) + (i === mark ? ' ← drawn' : '')))))

llmbook.explorable('sampling', ({start, tokens, logits}) => {
  const {make, slider, count} = llmbook, shown = 12
  const order = logits.map((_, i) => i).sort((a, b) => logits[b] - logits[a])
  const sizes = [1, 2, 3, 5, 10, 20, 40, 100, 200, 500, Infinity]
  const heat = slider('Temperature', 0, 3, 0.05, 1, x => x.toFixed(2), () => show()),
    k = slider('Top-k', 0, sizes.length - 1, 1, sizes.length - 1, x => sizes[x] < Infinity ? `${sizes[x]}` : 'all', () => show()),
    p = slider('Top-p', 0.05, 1, 0.05, 1, x => x < 1 ? x.toFixed(2) : 'all', () => show())
  const sliders = [heat, k, p], bars = make('div'), status = make('p', {role: 'status'})
  const show = () => {
    const shares = llmbook.nextProbabilities(logits, +heat.input.value, sizes[k.input.value], +p.input.value)
    const rest = order.slice(shown).reduce((sum, i) => sum + shares[i], 0), can = shares.filter(s => s > 0).length
    bars.replaceChildren(llmbook.bars([...order.slice(0, shown).map(i => tokens[i]), 'all others'], [...order.slice(0, shown).map(i => shares[i]), rest]))
    status.textContent = `${can.toLocaleString('en')} of ${count(shares.length, 'token')} can be drawn`
  }
  const again = make('button', {type: 'button', class: 'llm-do', onclick: () => { sliders.forEach(s => { s.input.value = s.input.defaultValue; s.tell() }); show() }}, "Back to the model's own shares")
  show()
  return [make('div', {class: 'llm-controls llm-sliders'}, ...sliders.map(s => s.part), again), make('p', {}, 'What comes after ', make('code', {}, start), '?'), bars, status]
})
