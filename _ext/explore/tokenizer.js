// Type a text, and see GPT-2's tokens, their ids, and the merges that made each.
llmbook.explorable('tokenizer', async ({text}) => {
  const {make, visible, count, named} = llmbook
  const bpe = new llmbook.BPE(await llmbook.load('gpt2'))
  const name = id => visible(bpe.bytes(id))
  const box = make('textarea', {rows: 3, maxlength: 2000, spellcheck: 'false', oninput: () => show()})
  const sum = make('p', {role: 'status'}), story = make('div', {class: 'llm-story', 'aria-live': 'polite'})
  let ids = [], at = -1
  box.value = text

  const explain = button => {
    at = [...row.children].indexOf(button)
    const id = ids[at], states = bpe.steps(bpe.bytes(id))
    const lines = states.map((parts, k) => make('li', {}, ...parts.flatMap(part => [make('code', {}, name(part)), ' ']),
      make('span', {class: 'llm-note'}, k ? `merge of rank ${parts.find(part => !states[k - 1].includes(part)) - 256}` : parts.length > 1 ? 'its bytes' : 'a byte, without a merge')))
    const broken = name(id).startsWith('\\x') && bpe.bytes(id)[0] > 127
    story.replaceChildren(make('p', {}, 'How ', make('code', {}, name(id)), ` is made, token ${id}:`), make('ol', {}, ...lines),
      ...broken ? [make('p', {class: 'llm-note'}, 'These bytes are a part of a character: GPT-2 cuts bytes, and one character can be spread over several tokens.')] : [])
    story.style.minHeight = `${story.offsetHeight}px`      // what is below shall not jump
  }
  const row = llmbook.row('Tokens', explain)
  const show = () => {
    const before = ids[at], bytes = new TextEncoder().encode(box.value).length
    ids = bpe.encode(box.value)
    sum.textContent = `${count(ids.length, 'token')} for ${count([...box.value].length, 'character')}, which are ${count(bytes, 'byte')}`
      + (box.value.length === 2000 ? '; no more fit in here' : '') + (box.value.includes('<|endoftext|>') ? '. The mark <|endoftext|> is cut like any text here: what a stranger types must not become the mark' : '')
    row.replaceChildren(...ids.map(id => make('button', {type: 'button', 'aria-label': `${bpe.decode([id]).replaceAll(' ', ' space ').replaceAll('\n', ' line end ')}, token ${id}`}, make('span', {}, name(id)), make('small', {}, `${id}`))))
    if (at >= 0 && ids[at] === before) return row.choose(row.children[at])
    at = -1
    row.choose(null)
    story.replaceChildren(make('p', {class: 'llm-note'}, ids.length ? 'Choose a token to see the merges that made it.' : 'Nothing typed, no tokens.'))
  }
  const examples = ['東京', '🙂', '1234567', 'Gisburn'].map(example => make('button', {type: 'button', class: 'llm-do', onclick: () => { box.value = example; show() }}, example))
  show()
  return [named('Text', box), make('div', {class: 'llm-controls'}, make('span', {class: 'llm-note'}, 'Try'), ...examples), sum, row, story]
})
