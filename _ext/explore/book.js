// What the explorables of the book share: loading of data, making of elements, byte-pair encoding.
(() => {
  const here = document.currentScript.src.replace(/[^/]*$/, '')
  const book = window.llmbook = {data: {}}

  // Data lie in scripts, because a page that was opened from a disk may load no other file.
  const loading = {}
  book.load = name => loading[name] ??= new Promise((done, fail) => {
    const script = book.make('script', {src: here + name + '.js'})
    script.onload = () => done(book.data[name])
    script.onerror = () => { delete loading[name]; fail(new Error(`${name}.js could not be loaded`)) }
    document.head.append(script)
  })

  book.make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag)
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith('on')) element[name] = value
      else if (value !== false) element.setAttribute(name, value === true ? '' : value)
    }
    element.append(...children)
    return element
  }

  // A control with its name before it.
  let labels = 0
  book.named = (text, control, ...more) => {
    control.id ||= `llm-control-${labels++}`
    return book.make('span', {class: 'llm-named'}, book.make('label', {for: control.id}, text), control, ...more)
  }
  book.choice = (n, change) => {
    const select = book.make('select', {onchange: () => change(select.selectedIndex)}, ...Array.from({length: n}, (_, k) => book.make('option', {}, `${k}`)))
    return select
  }
  // A slider says its value itself, in words; the text beside it is for the eye.
  book.slider = (name, min, max, step, value, say, change) => {
    const out = book.make('output', {'aria-live': 'off'})
    const input = book.make('input', {type: 'range', min, max, step, value, oninput: () => { tell(); change() }})
    const tell = () => { out.textContent = say(+input.value); input.setAttribute('aria-valuetext', out.textContent) }
    tell()
    return {input, tell, part: book.named(name, input, out)}
  }

  // A row of tokens, one stop of the Tab key: the arrows, Enter or a tap choose, and the mouse shows in passing.
  book.row = (name, show) => {
    const row = book.make('div', {class: 'llm-tokens', role: 'group', 'aria-label': name})
    let chosen = -1
    const buttons = () => [...row.querySelectorAll('button:not(:disabled)')]
    row.choose = button => {
      const all = buttons()
      chosen = all.indexOf(button)
      all.forEach((b, i) => { b.setAttribute('aria-pressed', i === chosen); b.tabIndex = i === Math.max(chosen, 0) ? 0 : -1 })
      if (button) show(button)
    }
    row.onclick = event => { const button = event.target.closest('button'); if (button && !button.disabled) row.choose(button) }
    row.onmouseover = event => { const button = event.target.closest('button'); if (button && !button.disabled) show(button) }
    row.onmouseleave = () => { const button = buttons()[chosen]; if (button) show(button) }
    row.onkeydown = event => {
      const all = buttons(), i = all.indexOf(document.activeElement)
      const next = all[{ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: all.length - 1}[event.key]]
      if (i < 0 || !next) return
      event.preventDefault()
      next.focus()
      row.choose(next)
    }
    return row
  }
  // The largest share has the full colour.
  book.shade = (buttons, weights) => {
    const most = Math.max(...weights) || 1
    buttons.forEach((button, j) => button.style.setProperty('--llm-weight', (weights[j] ?? 0) / most))
  }

  book.count = (n, what) => `${n.toLocaleString('en')} ${what}${n === 1 ? '' : 's'}`
  book.percent = share => share === 0 ? 'never' : share < 0.0005 ? '< 0.1 %' : share > 0.9995 && share < 1 ? '> 99.9 %' : `${(100 * share).toFixed(1)} %`

  // Call build(place, data) for each place of a kind, when the reader comes near it. The still picture stays without JavaScript.
  book.explorable = (kind, build) => document.addEventListener('DOMContentLoaded', () => {
    for (const place of document.querySelectorAll(`.llm-explore[data-kind="${kind}"]`)) {
      const watch = new IntersectionObserver(async seen => {
        if (!seen.some(entry => entry.isIntersecting)) return
        watch.disconnect()
        try {
          const parts = await build(JSON.parse(place.querySelector('script').textContent))
          const still = place.querySelector('.llm-still')
          still.replaceWith(book.make('div', {class: 'llm-live'}, ...parts))
          place.dataset.ready = 'true'
        } catch (error) {
          place.append(book.make('p', {class: 'llm-note', role: 'alert'}, `This picture does not move: ${error.message}.`))
        }
      }, {rootMargin: '600px'})
      watch.observe(place)
    }
  })

  // A token as llmbook.core.visible draws it.
  const signs = {' ': '·', '\n': '⏎', '\r': '␍', '\t': '⇥'}, hidden = /[\p{Cc}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}\p{Zs}]/u
  const code = c => { const n = c.codePointAt(0).toString(16); return n.length < 3 ? '\\x' + n.padStart(2, '0') : n.length < 5 ? '\\u' + n.padStart(4, '0') : '\\U' + n.padStart(8, '0') }
  book.visible = bytes => {
    let text
    try { text = new TextDecoder('utf-8', {fatal: true, ignoreBOM: true}).decode(bytes) }
    catch { return [...bytes].map(b => '\\x' + b.toString(16).padStart(2, '0')).join('') }
    return [...text].map(c => signs[c] ?? (hidden.test(c) ? code(c) : c)).join('') || '∅'
  }

  // GPT-2's way to cut a text into words; a merge never crosses their borders.
  const split = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu

  book.BPE = class {
    // bytes: the byte of each id below 256; merges: pairs of ids, one after the other, of which the k-th makes id 256 + k
    constructor({bytes, merges}) {
      this.of = bytes.map(b => [b])
      this.idOf = []
      bytes.forEach((b, id) => { this.idOf[b] = id })
      this.made = new Map()
      for (let k = 0; 2 * k < merges.length; k++) {
        const [a, b] = [merges[2 * k], merges[2 * k + 1]]
        this.made.set(a * 65536 + b, 256 + k)
        this.of.push(this.of[a].concat(this.of[b]))
      }
    }

    // The ids of a word after each merge, from single bytes to the end: the oldest merge first, wherever it fits.
    steps(bytes) {
      const states = [Array.from(bytes, b => this.idOf[b])]
      for (;;) {
        const ids = states.at(-1)
        let best = Infinity
        for (let i = 1; i < ids.length; i++) best = Math.min(best, this.made.get(ids[i - 1] * 65536 + ids[i]) ?? Infinity)
        if (best === Infinity) return states
        const next = []
        for (let i = 0; i < ids.length; i++) {
          if (i + 1 < ids.length && this.made.get(ids[i] * 65536 + ids[i + 1]) === best) { next.push(best); i++ }
          else next.push(ids[i])
        }
        states.push(next)
      }
    }

    encode(text) { return (text.match(split) ?? []).flatMap(word => this.steps(new TextEncoder().encode(word)).at(-1)) }
    bytes(id) { return Uint8Array.from(this.of[id] ?? []) }
    decode(ids) { return new TextDecoder('utf-8', {ignoreBOM: true}).decode(Uint8Array.from(ids.flatMap(id => this.of[id] ?? []))) }
  }
})()
