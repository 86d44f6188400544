//! QEMU's monitor: commands and events, for administrators and as far as the host's own policy grants them; and how fast
//! memory is written.

use super::{Answered, Named, domain::is_running, int, nothing, write_domain};
use crate::{
    error::{Code, Part, VirError},
    frame::{Frame, Header, QEMU},
    instance_uuid,
    session::{Call, Driver, Session},
    xdr::Writer,
};
use futures::{StreamExt, stream::select_all};
use karst_engine::stream::FdStream;
use karst_model::guest::{DirtyRateMode, MonitorAnswer, MonitorEvent};
use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::task::AbortHandle;
use tokio_util::codec::{FramedRead, LinesCodec};
use uuid::Uuid;

/// `VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP`: text for QEMU's human monitor.
const HUMAN: u32 = 1;
/// `VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX` and `_NOCASE`.
const REGEX: u32 = 1;
const NO_CASE: u32 = 2;
/// Registrations of one connection.
const MOST: usize = 64;
/// Longest name or expression of an event, and what an expression may take.
const LONGEST: usize = 256;
const EXPRESSION: usize = 1 << 16;
/// Longest line of an event.
const LINE: usize = 1 << 20;
/// The message of an event (`QEMU_PROC_DOMAIN_MONITOR_EVENT`).
const EVENT: i32 = 6;

static ASKED: AtomicU64 = AtomicU64::new(0);

fn only_machines(call: &Call) -> Result<(), VirError> {
    match call.opened()?.driver {
        Driver::Qemu => Ok(()),
        Driver::Lxc => {
            Err(VirError::no_support(crate::table::name_of(call.header.program, call.header.procedure)))
        }
    }
}

/// A command as clients write it: its name, arguments, and the number that comes back with the answer.
fn parse(text: &str) -> Result<(String, Value, Value), VirError> {
    let wrong = |why: &str| VirError::argument(format!("the command of the monitor {why}"));
    let mut object: Map<String, Value> =
        serde_json::from_str(text).map_err(|_| wrong("is no JSON object"))?;
    let name = match object.remove("execute") {
        Some(Value::String(name)) if !name.is_empty() => name,
        _ => return Err(wrong("says nothing to \"execute\"")),
    };
    let arguments = object.remove("arguments").unwrap_or_else(|| json!({}));
    if !arguments.is_object() {
        return Err(wrong("has \"arguments\" that are no object"));
    }
    let number = || json!(format!("libvirt-{}", ASKED.fetch_add(1, Ordering::Relaxed)));
    let id = object.remove("id").unwrap_or_else(number);
    match object.keys().next() {
        Some(key) => Err(wrong(&format!("has {key:?}, which nothing knows"))),
        None => Ok((name, arguments, id)),
    }
}

/// `QEMU_DOMAIN_MONITOR_COMMAND`
pub async fn command(call: Call) -> Answered {
    let (named, text, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, HUMAN)?;
    only_machines(&call)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let human = flags & HUMAN != 0;
    let (name, arguments, id) = match human {
        true => ("human-monitor-command".to_owned(), json!({"command-line": text}), Value::Null),
        false => parse(&text)?,
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, domain) = (&view.project.name, &view.instance.name);
    let said = engine.machine_monitor(context, project, domain, &name, arguments).await?;
    let text = match (said, human) {
        (MonitorAnswer::Returned(Value::String(text)), true) => text,
        (MonitorAnswer::Returned(_), true) => String::new(),
        (MonitorAnswer::Refused { class, description }, true) => {
            let text = format!("QEMU refused the command: {class}: {description}");
            return Err(VirError::new(Code::OperationFailed, Part::Qemu, text));
        }
        (MonitorAnswer::Returned(value), false) => json!({"return": value, "id": id}).to_string(),
        (MonitorAnswer::Refused { class, description }, false) => {
            json!({"id": id, "error": {"class": class, "desc": description}}).to_string()
        }
    };
    Ok(super::text(&text))
}

/// What of an event's name is listened for.
enum Pattern {
    Any,
    Exact(String),
    NoCase(String),
    Expression(Regex),
}

impl Pattern {
    fn parse(text: Option<String>, flags: u32) -> Result<Self, VirError> {
        let Some(text) = text else { return Ok(Self::Any) };
        let no_case = flags & NO_CASE != 0;
        if text.len() > LONGEST {
            return Err(VirError::argument(format!("an event has at most {LONGEST} characters")));
        }
        if flags & REGEX == 0 {
            return Ok(if no_case { Self::NoCase(text) } else { Self::Exact(text) });
        }
        let built = RegexBuilder::new(&text).case_insensitive(no_case).size_limit(EXPRESSION).build();
        let wrong = |_| VirError::argument(format!("failed to compile regex '{text}'"));
        built.map(Self::Expression).map_err(wrong)
    }

    fn is(&self, event: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(text) => text == event,
            Self::NoCase(text) => text.eq_ignore_ascii_case(event),
            Self::Expression(regex) => regex.is_match(event),
        }
    }
}

/// Who listens on a connection.
#[derive(Default)]
pub struct Listeners {
    all: BTreeMap<i32, (Option<Uuid>, Pattern)>,
    last: i32,
    task: Option<AbortHandle>,
}

impl Listeners {
    /// Ends all.
    pub fn clear(&mut self) {
        self.all.clear();
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// `QEMU_CONNECT_DOMAIN_MONITOR_EVENT_REGISTER`
pub async fn register(call: Call) -> Answered {
    let (named, event, flags) =
        call.arguments(|r| Ok((r.option(Named::read_domain)?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, REGEX | NO_CASE)?;
    only_machines(&call)?;
    let only = named.map(|n| call.guest(&n).map(|v| crate::domain_uuid(&v))).transpose()?;
    let pattern = Pattern::parse(event, flags)?;
    let session = &call.session;
    let follows = || session.monitor.lock().unwrap_or_else(|e| e.into_inner()).task.is_some();
    if !follows() {
        let fds = session.front.engine.machine_events(&session.context).await?;
        let streams = fds.into_iter().map(FdStream::new).collect::<Result<Vec<_>, _>>();
        let lines = streams
            .map_err(karst_model::Error::from)?
            .into_iter()
            .map(|stream| FramedRead::new(stream, LinesCodec::new_with_max_length(LINE)));
        let mut lines = select_all(lines);
        let weak: Weak<Session> = Arc::downgrade(session);
        let mut listeners = session.monitor.lock().unwrap_or_else(|e| e.into_inner());
        // Another call of this connection may have been faster: one task is enough.
        if listeners.task.is_none() {
            let task = tokio::spawn(async move {
                while let Some(line) = lines.next().await {
                    let Some(session) = weak.upgrade() else { return };
                    let event = line.ok().and_then(|l| serde_json::from_str(&l).ok());
                    let Some(event) = event else { continue };
                    tell(&session, &event).await;
                }
                // The host's process ended: whoever listens registers again.
                if let Some(session) = weak.upgrade() {
                    session.monitor.lock().unwrap_or_else(|e| e.into_inner()).task = None;
                }
            });
            listeners.task = Some(task.abort_handle());
        }
    }
    let mut listeners = session.monitor.lock().unwrap_or_else(|e| e.into_inner());
    if listeners.all.len() >= MOST {
        return Err(VirError::state(format!("a connection listens for {MOST} events of monitors at most")));
    }
    listeners.last = listeners.last.wrapping_add(1).max(1);
    let number = listeners.last;
    listeners.all.insert(number, (only, pattern));
    Ok(int(number))
}

/// `QEMU_CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER`
pub async fn deregister(call: Call) -> Answered {
    let number = call.arguments(|r| r.i32())?;
    let mut listeners = call.session.monitor.lock().unwrap_or_else(|e| e.into_inner());
    if listeners.all.remove(&number).is_none() {
        return Err(VirError::argument(format!("monitor event callback {number} not registered")));
    }
    if listeners.all.is_empty() {
        listeners.clear();
    }
    Ok(nothing())
}

/// Tells those who listen for it, of the guests of this connection.
async fn tell(session: &Arc<Session>, event: &MonitorEvent) {
    let guests = session.guests().unwrap_or_default();
    let Some(view) = guests.into_iter().find(|v| v.instance.id == event.instance) else { return };
    let uuid = instance_uuid(&view.instance);
    let wanted: Vec<i32> = {
        let listeners = session.monitor.lock().unwrap_or_else(|e| e.into_inner());
        let is = |(only, pattern): &(Option<Uuid>, Pattern)| {
            only.is_none_or(|o| o == uuid) && pattern.is(&event.event)
        };
        listeners.all.iter().filter(|(_, l)| is(l)).map(|(n, _)| *n).collect()
    };
    let details = (!event.data.is_empty()).then(|| Value::Object(event.data.clone()).to_string());
    for number in wanted {
        let mut w = Writer::new();
        w.i32(number);
        write_domain(&mut w, &view);
        w.string(&event.event).i64(event.seconds).u32(event.micros).optional(details.as_deref());
        session.send(Frame::new(Header { program: QEMU, ..Header::event(EVENT) }, w.finish())).await;
    }
}

/// `DOMAIN_START_DIRTY_RATE_CALC`: how fast memory is written, by looking at some of it twice where flags say nothing else.
pub async fn measure(call: Call) -> Answered {
    let (named, seconds, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 3)?;
    // `VIR_DOMAIN_DIRTYRATE_MODE_*`, of which the first counts.
    let mode = match flags {
        0 => DirtyRateMode::PageSampling,
        2 => DirtyRateMode::DirtyRing,
        _ => DirtyRateMode::DirtyBitmap,
    };
    only_machines(&call)?;
    if !(1..=60).contains(&seconds) {
        let text = format!("seconds={seconds} is invalid, please choose value within [1, 60].");
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.machine_dirty_rate(context, project, name, (seconds.unsigned_abs(), mode)).await?;
    Ok(nothing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_as_clients_write_them() {
        let (name, arguments, id) = parse(r#"{"execute":"query-status","id":"a"}"#).unwrap();
        assert_eq!((name.as_str(), arguments, id), ("query-status", json!({}), json!("a")));
        let (_, arguments, id) = parse(r#"{"execute":"x","arguments":{"a":1}}"#).unwrap();
        assert!(arguments["a"] == 1 && id.as_str().unwrap().starts_with("libvirt-"));
        for wrong in [
            "",
            "[]",
            "{}",
            r#"{"execute":1}"#,
            r#"{"execute":""}"#,
            r#"{"execute":"x","arguments":[]}"#,
            r#"{"execute":"x","control":{}}"#,
            r#"{"exec-oob":"x"}"#,
        ] {
            assert_eq!(parse(wrong).unwrap_err().code, Code::InvalidArg, "{wrong}");
        }
    }

    #[test]
    fn events_by_name_and_expression() {
        let is = |text: &str, flags, event: &str| Pattern::parse(Some(text.into()), flags).unwrap().is(event);
        assert!(Pattern::parse(None, 0).unwrap().is("STOP"));
        assert!(is("STOP", 0, "STOP") && !is("stop", 0, "STOP") && is("stop", NO_CASE, "STOP"));
        assert!(is("^ST", REGEX, "STOP") && !is("^st", REGEX, "STOP") && is("^st", REGEX | NO_CASE, "STOP"));
        for wrong in ["(".to_owned(), "x".repeat(LONGEST + 1), "(x{1000}){1000}".to_owned()] {
            assert!(Pattern::parse(Some(wrong), REGEX).is_err());
        }
    }
}
