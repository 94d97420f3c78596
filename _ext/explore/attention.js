// Choose a word, and see whom it attends to: by block and head of a small model, with the mask or without.
llmbook.attend = (scores, i, masked) => {
  const row = masked ? scores[i].slice(0, i + 1) : scores[i]
  const most = Math.max(...row), powers = row.map(s => Math.exp(s - most)), sum = powers.reduce((a, b) => a + b)
  return scores[i].map((_, j) => (powers[j] ?? 0) / sum)
}

llmbook.explorable('attention', ({tokens, scores}) => {
  const {make, named, choice} = llmbook
  let block = 0, head = 0, at = tokens.length - 1
  const mask = make('input', {type: 'checkbox', checked: true, onchange: () => show()})
  const controls = make('div', {class: 'llm-controls'},
    named('Block', choice(scores.length, k => { block = k; show() })),
    named('Head', choice(scores[0].length, k => { head = k; show() })),
    named('Causal mask', mask))
  const status = make('p', {role: 'status'})
  const buttons = tokens.map((token, i) => make('button', {type: 'button', 'aria-label': `${token}, place ${i}`}, make('span', {}, token), make('small', {})))
  const row = llmbook.row('Tokens', button => { at = buttons.indexOf(button); show() })
  row.classList.add('llm-shaded')
  row.append(...buttons)
  const show = () => {
    const weights = llmbook.attend(scores[block][head], at, mask.checked)
    llmbook.shade(buttons, weights)
    buttons.forEach((button, j) => { button.lastChild.textContent = weights[j].toFixed(2) })
    const top = weights.map((w, j) => [w, j]).sort((a, b) => b[0] - a[0]).slice(0, 3).filter(([w]) => w >= 0.005)
    status.textContent = `${tokens[at]} (place ${at}) attends to ` + top.map(([w, j]) => `${tokens[j]} (place ${j}) by ${(100 * w).toFixed(0)} %`).join(', ')
  }
  row.choose(buttons[at])
  return [controls, row, status]
})
