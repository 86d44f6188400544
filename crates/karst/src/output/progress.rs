//! Progress of operations and transfers on a terminal; nothing at all elsewhere.

use std::{
    io::IsTerminal,
    sync::{Mutex, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

/// How often the spinner moves.
const TICK: Duration = Duration::from_millis(100);

/// All lines that are drawn: they must not overwrite each other.
static LINES: OnceLock<MultiProgress> = OnceLock::new();

/// Runs something that prints, with the progress lines out of its way.
pub fn suspend(print: impl FnOnce()) {
    match LINES.get() {
        Some(lines) => lines.suspend(print),
        None => print(),
    }
}

/// A new line below the others, on stderr.
fn add(bar: ProgressBar) -> ProgressBar {
    LINES.get_or_init(MultiProgress::new).add(bar)
}

/// The line about one piece of work. Cheap to make: nothing is drawn before [`Progress::show`].
#[derive(Debug)]
pub struct Progress {
    label: String,
    visible: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Progress {
    /// For the work that `label` names; never drawn if `quiet` or stderr is no terminal.
    pub fn new(label: impl Into<String>, quiet: bool) -> Self {
        let visible = !quiet && std::io::stderr().is_terminal();
        Self { label: label.into(), visible, bar: Mutex::new(None) }
    }

    /// Whether there is a terminal to draw on.
    pub fn is_visible(&self) -> bool {
        self.visible
    }

    /// Draws the spinner.
    pub fn show(&self) {
        if !self.visible {
            return;
        }
        self.bar.lock().expect("no panic inside").get_or_insert_with(|| {
            let bar = add(ProgressBar::no_length());
            bar.set_style(ProgressStyle::with_template("{spinner} {prefix}{msg}").expect("a valid template"));
            bar.set_prefix(self.label.clone());
            bar.enable_steady_tick(TICK);
            bar
        });
    }

    /// Replaces the text behind the label.
    pub fn message(&self, text: &str) {
        if let Some(bar) = &*self.bar.lock().expect("no panic inside") {
            bar.set_message(format!(": {text}"));
        }
    }

    /// Shows what the metadata of an operation says.
    pub fn update(&self, metadata: &Value) {
        if let Some(text) = describe(metadata) {
            self.message(&text);
        }
    }

    /// Counts the bytes of a transfer while they pass; `total` is in bytes.
    pub fn count<S>(
        &self,
        total: Option<u64>,
        chunks: S,
    ) -> impl Stream<Item = std::io::Result<Bytes>> + use<S>
    where
        S: Stream<Item = std::io::Result<Bytes>>,
    {
        let bar = self.transfer(total);
        chunks.inspect(move |chunk| {
            if let (Some(bar), Ok(chunk)) = (&bar, chunk) {
                bar.inc(chunk.len() as u64);
            }
        })
    }

    /// Draws a bar for a transfer.
    pub fn transfer(&self, total: Option<u64>) -> Option<ProgressBar> {
        if !self.visible {
            return None;
        }
        let template = match total {
            Some(_) => "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            None => "{spinner} {prefix} {bytes} {bytes_per_sec}",
        };
        let bar = add(total.map_or_else(ProgressBar::no_length, ProgressBar::new));
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        bar.set_prefix(self.label.clone());
        *self.bar.lock().expect("no panic inside") = Some(bar.clone());
        Some(bar)
    }

    /// Removes the line.
    pub fn finish(&self) {
        if let Some(bar) = self.bar.lock().expect("no panic inside").take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// One line about an operation: Incus puts texts under keys ending in `_progress` and figures under `progress`.
pub fn describe(metadata: &Value) -> Option<String> {
    let metadata = metadata.as_object()?;
    let text =
        metadata.iter().find(|(key, _)| key.ends_with("_progress")).and_then(|(_, value)| value.as_str());
    if let Some(text) = text {
        return Some(text.to_owned());
    }
    let progress = metadata.get("progress")?;
    if let Some(text) = progress.as_str() {
        return Some(text.to_owned());
    }
    let field = |name: &str| match progress.get(name) {
        Some(Value::String(text)) if !text.is_empty() => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    let mut parts = Vec::new();
    parts.extend(field("stage").map(|stage| stage.replace('_', " ")));
    parts.extend(field("percent").filter(|percent| percent != "-1").map(|percent| format!("{percent}%")));
    let speed = field("speed").and_then(|speed| speed.parse::<u64>().ok()).filter(|speed| *speed > 0);
    parts.extend(speed.map(|speed| format!("({}/s)", super::units::bytes(speed))));
    (!parts.is_empty()).then(|| parts.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn progress_texts() {
        assert_eq!(describe(&json!({"download_progress": "rootfs: 34%"})).unwrap(), "rootfs: 34%");
        let figures = json!({"progress": {"stage": "create_instance", "percent": "7", "speed": "1048576"}});
        assert_eq!(describe(&figures).unwrap(), "create instance 7% (1.00MiB/s)");
        assert_eq!(describe(&json!({"progress": {"percent": 50}})).unwrap(), "50%");
        assert_eq!(describe(&json!({"fingerprint": "x"})), None);
        assert_eq!(describe(&Value::Null), None);
    }
}
