package report

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// browser is a headless Chromium, spoken to over a pipe (Chrome DevTools Protocol).
type browser struct {
	t       *testing.T
	in      io.Writer
	out     chan message
	session string
	next    int
	// Of the page that is open now.
	requests, complaints []string
}

type message struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Message string `json:"message"`
	} `json:"error"`
}

// patience is how long one step of a browser may take on a busy machine.
const patience = 60 * time.Second

func start(t *testing.T) *browser {
	t.Helper()
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Skip("Chromium is not installed")
	}
	commands, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, answers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.MkdirTemp("", "browser")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-extensions", "--mute-audio",
		"--user-data-dir="+home, "--remote-debugging-pipe", "about:blank")
	cmd.ExtraFiles = []*os.File{commands, answers} // 3 and 4
	cmd.Env = append(os.Environ(), "HOME="+home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // it starts many
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = commands.Close(), answers.Close()
	b := &browser{t: t, in: in, out: make(chan message, 1<<12)}
	go func() {
		defer close(b.out)
		r := bufio.NewReaderSize(out, 1<<20)
		for {
			data, err := r.ReadBytes(0)
			if err != nil {
				return
			}
			var m message
			if json.Unmarshal(data[:len(data)-1], &m) == nil {
				b.out <- m
			}
		}
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		_, _ = in.Close(), out.Close()
		for range b.out {
		}
		// What it has started may write until it is gone, too.
		for range 100 {
			if os.RemoveAll(home) == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Network", "Runtime", "Log"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// call sends a command and waits for its answer; what happens meanwhile is noted.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	b.next++
	request := map[string]any{"id": b.next, "method": method}
	if params != nil {
		request["params"] = params
	}
	if b.session != "" {
		request["sessionId"] = b.session
	}
	data, err := json.Marshal(request)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.in.Write(append(data, 0)); err != nil {
		b.t.Fatal(err)
	}
	b.until(func(m message) bool {
		if m.ID != b.next {
			return false
		}
		if m.Error != nil {
			b.t.Fatalf("%s: %s", method, m.Error.Message)
		}
		if result != nil {
			if err := json.Unmarshal(m.Result, result); err != nil {
				b.t.Fatalf("%s: %v", method, err)
			}
		}
		return true
	})
}

func (b *browser) until(done func(message) bool) {
	b.t.Helper()
	late := time.After(patience)
	for {
		select {
		case m, ok := <-b.out:
			if !ok {
				b.t.Fatal("the browser has gone")
			}
			b.note(m)
			if done(m) {
				return
			}
		case <-late:
			b.t.Fatal("the browser does not answer")
		}
	}
}

func (b *browser) note(m message) {
	var p struct {
		Request struct{ URL string }
		Entry   struct{ Level, Text string }
		Type    string
		Args    []struct{ Value any }
		Details struct {
			Text      string
			Exception struct{ Description string }
		} `json:"exceptionDetails"`
	}
	_ = json.Unmarshal(m.Params, &p)
	switch m.Method {
	case "Network.requestWillBeSent":
		b.requests = append(b.requests, p.Request.URL)
	case "Log.entryAdded":
		b.complaints = append(b.complaints, p.Entry.Level+": "+p.Entry.Text)
	case "Runtime.exceptionThrown":
		b.complaints = append(b.complaints, p.Details.Text+" "+p.Details.Exception.Description)
	case "Runtime.consoleAPICalled":
		b.complaints = append(b.complaints, fmt.Sprint("console ", p.Type, " ", p.Args))
	case "Page.javascriptDialogOpening":
		b.t.Error("the page opened a dialog")
	}
}

// open shows a page in a window of that size, and waits until it is there.
func (b *browser) open(page string, width, height int, dark bool) {
	b.t.Helper()
	name := filepath.Join(b.t.TempDir(), "report.html")
	if err := os.WriteFile(name, []byte(page), 0o600); err != nil {
		b.t.Fatal(err)
	}
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}}}, nil)
	b.requests, b.complaints = nil, nil
	b.call("Page.navigate", map[string]any{"url": (&url.URL{Scheme: "file", Path: name}).String()}, nil)
	b.wait("document.readyState === 'complete' && document.querySelector('main') !== null")
}

// eval runs a script as the developer tools do, past the page's policy.
func (b *browser) eval(script string, result any) {
	b.t.Helper()
	var r struct {
		Result struct {
			Value json.RawMessage
		}
		Details *struct {
			Exception struct{ Description string }
		} `json:"exceptionDetails"`
	}
	b.call("Runtime.evaluate", map[string]any{"expression": script, "returnByValue": true, "awaitPromise": true}, &r)
	if r.Details != nil {
		b.t.Fatalf("%s: %s", script, r.Details.Exception.Description)
	}
	if result != nil && r.Result.Value != nil {
		if err := json.Unmarshal(r.Result.Value, result); err != nil {
			b.t.Fatalf("%s: %v", script, err)
		}
	}
}

func (b *browser) wait(condition string) {
	b.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var is bool
		if b.eval("Boolean("+condition+")", &is); is {
			return
		}
	}
	b.t.Fatalf("it never came to %s; %q", condition, b.complaints)
}

func (b *browser) press(key string, code int) {
	b.t.Helper()
	for _, kind := range []string{"keyDown", "keyUp"} {
		p := map[string]any{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
		if kind == "keyDown" && key == "Enter" {
			p["text"] = "\r"
		}
		b.call("Input.dispatchKeyEvent", p, nil)
	}
}

// picture leaves pictures of the page, or of what is seen of it, where they are
// wanted.
func (b *browser) picture(name string, whole bool) {
	b.t.Helper()
	if *keep == "" {
		return
	}
	var size struct{ Width, Height float64 }
	b.eval("({width: innerWidth, height: document.documentElement.scrollHeight})", &size)
	const slice, most = 1700, 6
	for n := range most {
		p := map[string]any{}
		if whole {
			height := min(slice, size.Height-float64(n)*slice)
			if height <= 0 {
				break
			}
			p = map[string]any{"captureBeyondViewport": true, "clip": map[string]any{"x": 0, "y": n * slice, "width": size.Width, "height": height, "scale": 1}}
		}
		var shot struct{ Data string }
		b.call("Page.captureScreenshot", p, &shot)
		data, err := base64.StdEncoding.DecodeString(shot.Data)
		if err == nil {
			err = os.WriteFile(filepath.Join(*keep, fmt.Sprintf("%s-%d.png", name, n)), data, 0o600)
		}
		if err != nil {
			b.t.Fatal(err)
		}
		if !whole {
			break
		}
	}
}

// calm holds the page to what it promises: it fetches nothing, and nothing in it
// meets its policy.
func (b *browser) calm() {
	b.t.Helper()
	for _, u := range b.requests {
		if !strings.HasPrefix(u, "file://") || !strings.HasSuffix(u, "/report.html") {
			b.t.Errorf("it asked for %.200s", u)
		}
	}
	if len(b.requests) != 1 {
		b.t.Errorf("%d requests", len(b.requests))
	}
	if len(b.complaints) > 0 {
		b.t.Errorf("the browser complains: %.600q", b.complaints)
	}
}

// fits says by how much the page is wider than its window, with what sticks out.
const fits = `(() => { const w = document.documentElement.clientWidth, over = document.documentElement.scrollWidth - w;
	return over <= 0 ? "" : over + " px: " + [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > w + 1 && !e.closest("nav, pre, .player")).slice(0, 3).map(e => e.outerHTML.slice(0, 120)).join(" | "); })()`

// TestBrowser opens a report as people do: at a desk, on a phone, in the dark, with
// a keyboard.
func TestBrowser(t *testing.T) {
	b := start(t)
	_, page := render(t, outage(t))
	var text string
	b.open(page, 1200, 900, false)
	if b.eval(fits, &text); text != "" {
		t.Errorf("it is too wide: %s", text)
	}
	b.picture("desktop", true)
	b.eval("document.querySelector('main').innerText", &text)
	for _, part := range []string{"37 s", "scale ds/collector -n telemetry --to 0", "came in by ssh", "undone by action 3", "not set"} {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not to be read", part)
		}
	}
	if strings.Contains(text, "looked: top") {
		t.Error("what matters less is shown at once")
	}
	b.eval("document.getElementById('all').click()", nil)
	if b.eval("document.querySelector('main').innerText", &text); !strings.Contains(text, "looked: top") {
		t.Error("what matters less cannot be seen")
	}

	// With the keyboard alone: the first stop skips the menu, and a moment of a
	// recording is played.
	b.press("Tab", 9)
	if b.eval("document.activeElement.className", &text); text != "skip" {
		t.Errorf("the first stop is %q", text)
	}
	b.eval("document.querySelector('button[data-session]').focus()", nil)
	b.press("Enter", 13)
	b.wait("document.querySelector('#session-1[open] .ap-term-text')?.textContent.includes('scale ds/collector -n telemetry --to 0')")
	b.wait("document.querySelector('#session-1 .ap-term-text').textContent.includes('applied through etcd')")
	b.wait("document.querySelector('#session-1 .ap-term-text').textContent.includes('Welcome to cp-1.prod')")
	b.wait("document.querySelector('#session-1 .ap-marker') !== null")
	b.picture("player", false)
	b.calm()

	b.open(page, 390, 844, false)
	if b.eval(fits, &text); text != "" {
		t.Errorf("it is too wide for a phone: %s", text)
	}
	b.picture("phone", true)
	b.open(page, 1200, 900, true)
	b.picture("dark", true)
	var ratio float64
	// Contrast of what is written softest (WCAG 2.2, 1.4.3).
	b.eval(`(() => { const rgb = c => c.match(/[\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
		const light = c => { const [r, g, b] = rgb(c); return .2126 * r + .7152 * g + .0722 * b + .05; };
		const a = light(getComputedStyle(document.querySelector(".soft")).color), c = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
		return Math.max(a, c) / Math.min(a, c); })()`, &ratio)
	if ratio < 4.5 {
		t.Errorf("contrast %.1f in the dark", ratio)
	}
	b.calm()

	// Whatever was recorded, nothing of it runs, loads, or makes a terminal without end.
	_, page = render(t, hostile(t))
	b.open(page, 390, 844, false)
	if b.eval(fits, &text); text != "" {
		t.Errorf("hostile text makes it too wide: %s", text)
	}
	b.eval("for (const d of document.querySelectorAll('details')) d.open = true", nil)
	b.wait("document.querySelector('.session .ap-term-text')")
	b.eval("document.querySelector('.session [data-on]').click()", nil)
	b.wait("document.querySelector('.ap-term-text').textContent.includes('done')")
	var size struct{ Columns, Rows int }
	b.eval(`(() => { const s = getComputedStyle(document.querySelector(".ap-term-text")); return { columns: +s.getPropertyValue("--term-cols"), rows: +s.getPropertyValue("--term-rows") }; })()`, &size)
	if size.Columns < 1 || size.Columns > maxColumns || size.Rows > maxRows {
		t.Errorf("the terminal has %+v", size)
	}
	b.picture("hostile", true)
	b.eval("document.querySelectorAll('img, iframe, object, embed, link, a[href]:not([href^=\"#\"])').length.toString()", &text)
	if text != "0" {
		t.Errorf("%s elements that hostile text made", text)
	}
	b.calm()
	// The policy holds against what is not the page's own.
	b.eval(`{ const s = document.createElement("script"); s.textContent = "window.got = 1"; document.body.append(s); const i = new Image(); i.src = "http://127.0.0.1:9/x.png"; }`, nil)
	var got bool
	if b.eval("window.got === 1", &got); got {
		t.Error("a foreign script ran")
	}
}
