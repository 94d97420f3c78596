// The model of page 16 writes in the page: what could have come at each place, and whom each place attends to.
llmbook.explorable('writer', ({prompt, size}) => {
  const {make, named, choice, slider, visible, bars, count, percent} = llmbook, LENGTH = 120
  const box = make('textarea', {rows: 2, maxlength: 400, spellcheck: 'false'})
  const heat = slider('Temperature', 0, 2, 0.1, 0.8, x => x.toFixed(1), () => {})
  const button = make('button', {type: 'button', class: 'llm-do', onclick: () => { if (writing) writing = false; else write() }}, 'Write')
  const status = make('p', {role: 'status'}, `The first time, ${size} MB of weights are loaded.`), progress = make('p', {class: 'llm-note'})
  const controls = make('div', {class: 'llm-controls'}), words = make('p', {'aria-live': 'polite'}), look = make('div', {}, words)
  let writing = false, model, bpe, written = [], at = -1, block = 0, head = 0
  const name = id => bpe.bytes(id).length ? visible(bpe.bytes(id)) : '<|endoftext|>'
  box.value = prompt

  // Of each token its id, its button, and of those that the model drew what it saw.
  const show = i => {
    const {id, shares, attention, start} = written[at = i]
    const best = shares.map((s, id) => [s, id]).sort((a, b) => b[0] - a[0]).filter(([s]) => s > 0).slice(0, 8)
    if (!best.some(pair => pair[1] === id)) best[best.length - 1] = [shares[id], id]
    const weights = attention[block][head]
    llmbook.shade(written.map(token => token.button), written.map((_, j) => j < i ? weights[j - start] ?? 0 : 0))
    words.replaceChildren('Here the model gave these shares, and drew ', make('code', {}, name(id)), ` (${percent(shares[id])}). Shaded above: where head ${head} of block ${block} looked when it had read up to the token before.`)
    look.replaceChildren(words, bars(best.map(([, id]) => name(id)), best.map(([s]) => s), best.findIndex(pair => pair[1] === id)))
  }
  const row = llmbook.row('What is written', chosen => show(written.findIndex(token => token.button === chosen)))
  row.classList.add('llm-shaded', 'llm-written')
  const put = (id, seen) => {
    const button = make('button', {type: 'button', tabindex: -1, disabled: !seen}, name(id).replaceAll('·', ' '))
    written.push({id, button, ...seen})
    row.append(button, ...bpe.decode([id]).endsWith('\n') ? [make('br')] : [])
  }
  const draw = shares => {
    let dart = Math.random()
    for (let id = 0; id < shares.length; id++) if ((dart -= shares[id]) < 0) return id
    return shares.lastIndexOf(Math.max(...shares))
  }
  const write = async () => {
    writing = true
    button.textContent = 'Stop'
    try {
      if (!model) {
        status.textContent = 'Loading the model …'
        const data = await llmbook.load('shakespeare')
        ;[model, bpe] = [new llmbook.GPT(data), new llmbook.BPE(data.tokenizer)]
        controls.append(named('Block', choice(data.config.n_layer, k => { block = k; if (at >= 0) show(at) })), named('Head', choice(data.config.n_head, k => { head = k; if (at >= 0) show(at) })))
      }
      const ids = bpe.encode(box.value), T = model.config.context_length
      if (!ids.length) throw new Error('there is nothing to continue; type a beginning')
      row.replaceChildren()
      ;[written, at] = [[], -1]
      look.replaceChildren(words)
      words.replaceChildren()
      for (const id of ids) put(id)
      status.textContent = 'Writing …'
      let n = 0
      for (; n < LENGTH && writing; n++) {
        const {logits, attention, start} = model.after(ids)
        const shares = llmbook.nextProbabilities(logits, +heat.input.value), id = draw(shares)
        ids.push(id)
        put(id, {shares, attention, start})
        progress.textContent = `${n + 1} of ${count(LENGTH, 'token')}` + (ids.length > T ? `. It has become slow: more than ${T} tokens do not fit, so the window slides, every token has a new place, and nothing that was kept can be used.` : '')
        await new Promise(done => setTimeout(done))
      }
      status.textContent = `${n < LENGTH ? 'Stopped' : 'Done'}. Underlined is what you typed; choose another token to see what else could have stood there.`
      row.choose(written[at < 0 ? written.length - 1 : at].button)
    } catch (error) { status.textContent = `It cannot write: ${error.message}.` }
    writing = false
    button.textContent = 'Write'
  }
  return [named('Beginning', box), make('div', {class: 'llm-controls llm-sliders'}, heat.part, button), status, controls, row, progress, look]
})
