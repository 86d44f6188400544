//! `monitor`: events as they happen.

use futures::StreamExt;
use serde_json::Value;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Event, Url},
    context::Context,
    error::{Error, Result, one_line},
    output::{self, member, to_yaml},
};

/// Options of `monitor`.
#[derive(Debug, clap::Args)]
pub struct Monitor {
    /// lifecycle, operation, logging, network-acl (repeatable; default: all)
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kinds: Vec<String>,
    /// Of all projects
    #[arg(long)]
    all_projects: bool,
    /// Least important log messages: debug, info, warning, error
    #[arg(long, value_name = "LEVEL")]
    loglevel: Option<Level>,
    /// pretty, json (a line an event) or yaml
    #[arg(short, long, value_enum, default_value = "pretty")]
    format: Format,
    /// The same as --format pretty
    #[arg(long, hide = true)]
    pretty: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Level {
    Trace,
    Debug,
    Info,
    #[value(alias = "warn")]
    Warning,
    Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Pretty,
    Json,
    Yaml,
}

impl Monitor {
    /// Prints until interrupted, or until the server ends it, which is an error.
    pub async fn run(self, context: &Context) -> Result<()> {
        let mut url = Url::new(&["events"]);
        if !self.kinds.is_empty() {
            url = url.with("type", self.kinds.join(","));
        }
        if self.all_projects {
            url = url.with("all-projects", true);
        }
        let mut socket = context.client.websocket(&url).await?;
        while let Some(message) = socket.next().await {
            match message.map_err(|error| Error::Unreachable(format!("the events ended: {error}")))? {
                Message::Text(text) => self.print(&text)?,
                Message::Close(_) => break,
                _ => {}
            }
        }
        Err(Error::Unreachable("the server ended the events".to_owned()))
    }

    fn print(&self, text: &str) -> Result<()> {
        let object: Value =
            serde_json::from_str(text).map_err(|error| Error::Local(format!("unknown event: {error}")))?;
        let event: Event = serde_json::from_value(object.clone()).map_err(Error::local)?;
        if self.is_below(&event) {
            return Ok(());
        }
        match if self.pretty { Format::Pretty } else { self.format } {
            Format::Pretty => output::line(&pretty(&event)),
            Format::Json => output::line(&object.to_string()),
            Format::Yaml => output::print(&format!("{}---\n", to_yaml(&object)?)),
        }
    }

    /// Whether it is a log message that is not important enough.
    fn is_below(&self, event: &Event) -> bool {
        let (Some(least), "logging") = (self.loglevel, event.kind.as_str()) else {
            return false;
        };
        let level = <Level as clap::ValueEnum>::from_str(&member(&event.metadata, "level"), true);
        level.is_ok_and(|level| level < least)
    }
}

/// One event, one line.
fn pretty(event: &Event) -> String {
    let time = event.timestamp.get(..19).unwrap_or(&event.timestamp);
    let metadata = &event.metadata;
    let what = match event.kind.as_str() {
        "lifecycle" => {
            let context =
                metadata.get("context").filter(|context| context.as_object().is_some_and(|c| !c.is_empty()));
            let context = context.map(|context| format!(" {context}")).unwrap_or_default();
            format!("{} {}{context}", member(metadata, "action"), member(metadata, "source"))
        }
        "operation" => {
            let err = member(metadata, "err");
            let progress = output::progress::describe(&metadata["metadata"]).map(|text| format!(" ({text})"));
            format!(
                "{} {}: {}{}{}",
                member(metadata, "id"),
                member(metadata, "description"),
                member(metadata, "status"),
                progress.unwrap_or_default(),
                if err.is_empty() { String::new() } else { format!(": {err}") }
            )
        }
        "logging" => {
            let context = metadata["context"].as_object().into_iter().flatten();
            let context: String =
                context.map(|(key, value)| format!(" {key}={}", output::scalar(value))).collect();
            format!("{} {}{context}", member(metadata, "level").to_uppercase(), member(metadata, "message"))
        }
        _ => metadata.to_string(),
    };
    let project = match event.project.as_str() {
        "" | crate::client::DEFAULT_PROJECT => String::new(),
        other => format!("[{other}] "),
    };
    format!("{time} {:<9} {project}{}", event.kind, one_line(&what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(value: Value) -> String {
        pretty(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn one_line_an_event() {
        let started = json!({"type": "lifecycle", "timestamp": "2026-11-21T08:00:00.123Z", "project": "default",
            "metadata": {"action": "instance-started", "source": "/1.0/instances/c1", "context": {}}});
        assert_eq!(event(started), "2026-11-21T08:00:00 lifecycle instance-started /1.0/instances/c1");
        let failed = json!({"type": "operation", "timestamp": "t", "project": "p", "metadata": {"id": "x",
            "description": "Starting instance", "status": "Failure", "err": "no\nspace", "metadata": {"progress": {"percent": "3"}}}});
        assert_eq!(event(failed), "t operation [p] x Starting instance: Failure (3%): no; space");
        let log = json!({"type": "logging", "timestamp": "t", "metadata": {"level": "warning", "message": "m",
            "context": {"a": "b"}}});
        assert_eq!(event(log), "t logging   WARNING m a=b");
    }
}
