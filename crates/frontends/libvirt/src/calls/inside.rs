//! What the agent inside a guest answers: file systems, clock, processors, users, and commands of its own protocol.

use super::{Answered, Named, domain::is_running, figures::by_serial, nothing};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xdr::{Reader, Typed, Writer},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use karst_engine::{InstanceView, compute::inside::AGENT_MAX};
use karst_model::{Error, ErrorKind};
use serde_json::{Map, Value, json};
use std::{collections::BTreeSet, time::Duration};

/// How long an agent is waited for where nobody says.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where a domain's own is kept, in libvirt's words of it.
const TIMEOUT: &str = "user.libvirt.agent_timeout";
/// Most of anything that is taken from a guest.
const MOST: usize = 256;

/// What the agent inside did not do.
pub(super) fn failed(e: Error) -> VirError {
    let code = match e.kind {
        ErrorKind::Unavailable | ErrorKind::Timeout => Code::AgentUnresponsive,
        ErrorKind::Unsupported => Code::OperationUnsupported,
        _ => return e.into(),
    };
    VirError::new(code, Part::Qemu, e.to_string())
}

async fn ask_within(
    call: &Call,
    view: &InstanceView,
    command: &str,
    arguments: Value,
    limit: Duration,
) -> Result<Value, VirError> {
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.guest_agent(context, project, name, (command, arguments), limit).await.map_err(failed)
}

async fn ask(call: &Call, view: &InstanceView, command: &str, arguments: Value) -> Result<Value, VirError> {
    let chosen = view.instance.config.get(TIMEOUT).and_then(|s| s.parse().ok());
    let patience = chosen.and_then(|s| limit(s).ok()).unwrap_or(PATIENCE);
    ask_within(call, view, command, arguments, patience).await
}

/// `DOMAIN_AGENT_SET_RESPONSE_TIMEOUT`: how long its agent is waited for from now on.
pub async fn set_timeout(call: Call) -> Answered {
    let (named, seconds, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if seconds == 0 {
        let text = "an agent is always waited for: 1 second or more, -1 for the default, -2 for the longest";
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    limit(seconds)?;
    let value = (seconds != -1).then(|| seconds.to_string());
    if view.instance.config.get(TIMEOUT) != value.as_ref() {
        super::domain::set_keys(&call, &view, vec![(TIMEOUT.into(), value)], None).await?;
    }
    Ok(super::int(0))
}

fn nonsense(command: &str) -> VirError {
    VirError::new(Code::InternalError, Part::Qemu, format!("the guest's answer to {command} makes no sense"))
}

/// Text of a guest: without what a terminal would take for commands, and short.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(1024).collect()
}

fn text_of(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(plain)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten().take(MOST)
}

fn mountpoints(r: &mut Reader<'_>) -> Result<(Named, Vec<String>, u32), VirError> {
    Ok((Named::read_domain(r)?, r.array(MOST, |r| r.string())?, r.u32()?))
}

async fn freezing(call: Call, freeze: bool) -> Answered {
    let (named, places, flags) = call.arguments(mountpoints)?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let (command, arguments) = match (freeze, places.is_empty()) {
        (true, true) => ("guest-fsfreeze-freeze", json!({})),
        (true, false) => ("guest-fsfreeze-freeze-list", json!({"mountpoints": places})),
        (false, true) => ("guest-fsfreeze-thaw", json!({})),
        (false, false) => {
            let text = "specifying mountpoints is not supported: file systems thaw all at once";
            return Err(VirError::new(Code::ArgumentUnsupported, Part::Qemu, text));
        }
    };
    let count = ask(&call, &view, command, arguments).await?;
    let count = count.as_i64().and_then(|n| i32::try_from(n).ok()).ok_or_else(|| nonsense(command))?;
    Ok(super::int(count))
}

/// `DOMAIN_FSFREEZE`
pub async fn freeze(call: Call) -> Answered {
    freezing(call, true).await
}

/// `DOMAIN_FSTHAW`
pub async fn thaw(call: Call) -> Answered {
    freezing(call, false).await
}

/// `DOMAIN_FSTRIM`
pub async fn trim(call: Call) -> Answered {
    let (named, place, minimum, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.option(|r| r.string())?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if place.is_some() {
        let text = "Specifying mount point is not supported for now: all file systems are trimmed at once";
        return Err(VirError::new(Code::ArgumentUnsupported, Part::Qemu, text));
    }
    ask_within(&call, &view, "guest-fstrim", json!({"minimum": minimum}), AGENT_MAX).await?;
    Ok(nothing())
}

/// Name, mount point and kind of a file system, and the targets of its disks.
fn file_systems(view: &InstanceView, call: &Call, answer: &Value) -> Vec<([String; 3], Vec<String>)> {
    let disks = super::figures::disks(&call.session.front.engine.inner().inventory.read(), view);
    list(answer)
        .filter_map(|f| {
            let texts = [text_of(f, "mountpoint")?, text_of(f, "name")?, text_of(f, "type")?];
            let of: BTreeSet<String> = f
                .get("disk")
                .into_iter()
                .flat_map(list)
                .filter_map(|d| by_serial(&disks, d.get("serial")?.as_str()?))
                .map(|d| d.target.clone())
                .collect();
            Some((texts, of.into_iter().collect()))
        })
        .collect()
}

/// `DOMAIN_GET_FSINFO`
pub async fn fs_info(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    let answer = ask(&call, &view, "guest-get-fsinfo", json!({})).await?;
    let all = file_systems(&view, &call, &answer);
    let count = all.len() as u32;
    let mut w = Writer::new();
    w.array(all, |w, (texts, disks)| {
        for text in &texts {
            w.string(text);
        }
        w.array(&disks, |w, disk| {
            w.string(disk);
        });
    });
    w.u32(count);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_TIME`
pub async fn time(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    let answer = ask(&call, &view, "guest-get-time", json!({})).await?;
    let ns = answer.as_i64().ok_or_else(|| nonsense("guest-get-time"))?;
    let mut w = Writer::new();
    w.i64(ns.div_euclid(1_000_000_000)).u32(ns.rem_euclid(1_000_000_000) as u32);
    Ok(w.finish().into())
}

/// `DOMAIN_SET_TIME`: as told, or as the host's clock is (`VIR_DOMAIN_TIME_SYNC`).
pub async fn set_time(call: Call) -> Answered {
    let (named, seconds, ns, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u64()? as i64, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 1)?;
    let view = call.guest(&named)?;
    let arguments = match flags & 1 {
        1 => json!({}),
        _ => {
            let time = seconds.checked_mul(1_000_000_000).and_then(|s| s.checked_add(i64::from(ns)));
            json!({"time": time.ok_or_else(|| VirError::argument(format!("Time '{seconds}' is too big for guest agent")))?})
        }
    };
    ask(&call, &view, "guest-set-time", arguments).await?;
    Ok(nothing())
}

/// `DOMAIN_SET_USER_PASSWORD`
pub async fn set_password(call: Call) -> Answered {
    let (named, user, password, flags) = call.arguments(|r| {
        let named = Named::read_domain(r)?;
        Ok((named, r.option(|r| r.string())?, r.option(|r| r.string())?, r.u32()?))
    })?;
    // Crypted already.
    call.known_flags(flags, 1)?;
    let view = call.guest(&named)?;
    let missing =
        |what: &str| VirError::argument(format!("{what} in virDomainSetUserPassword must not be NULL"));
    let user = user.ok_or_else(|| missing("user"))?;
    let password = BASE64_STANDARD.encode(password.ok_or_else(|| missing("password"))?);
    let arguments = json!({"username": user, "password": password, "crypted": flags & 1 == 1});
    ask(&call, &view, "guest-set-user-password", arguments).await?;
    Ok(nothing())
}

/// Processors as `0-2,5`.
fn ranges(all: &BTreeSet<u64>) -> String {
    let mut parts: Vec<(u64, u64)> = vec![];
    for n in all {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *n => *last = *n,
            _ => parts.push((*n, *n)),
        }
    }
    let shown = parts.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    shown.collect::<Vec<_>>().join(",")
}

fn typed(all: Vec<(String, Typed)>) -> Writer {
    let mut w = Writer::new();
    w.array(all, |w, (field, value)| {
        w.typed(&field, &value);
    });
    w
}

/// `DOMAIN_GET_GUEST_VCPUS`
pub async fn vcpus(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    let answer = ask(&call, &view, "guest-get-vcpus", json!({})).await?;
    let of = |key: Option<&str>| {
        let is = |v: &&Value| key.is_none_or(|key| v.get(key).and_then(Value::as_bool) == Some(true));
        let ids = list(&answer).filter(is).filter_map(|v| v.get("logical-id")?.as_u64()).collect();
        Typed::Text(ranges(&ids))
    };
    let all = [("vcpus", of(None)), ("online", of(Some("online"))), ("offlinable", of(Some("can-offline")))];
    Ok(typed(all.map(|(field, value)| (field.to_owned(), value)).into()).finish().into())
}

/// Reads `0-2,5`.
pub(super) fn processors(text: &str) -> Result<Vec<u64>, VirError> {
    let wrong = || VirError::argument(format!("invalid cpumap {text:?}"));
    let mut all = vec![];
    for part in text.split(',') {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        let (a, b): (u64, u64) =
            (a.trim().parse().map_err(|_| wrong())?, b.trim().parse().map_err(|_| wrong())?);
        if a > b || b > 4095 {
            return Err(wrong());
        }
        all.extend(a..=b);
    }
    Ok(all)
}

/// A processor as the system inside knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Processor {
    /// Its number.
    pub id: u64,
    /// It is in use.
    pub online: bool,
    /// It can be taken out of use.
    pub can_go: bool,
}

/// The processors that the system inside knows of.
///
/// # Errors
/// Those of asking it.
pub(super) async fn processors_of(call: &Call, view: &InstanceView) -> Result<Vec<Processor>, VirError> {
    let answer = ask(call, view, "guest-get-vcpus", json!({})).await?;
    let is = |v: &Value, key: &str| v.get(key).and_then(Value::as_bool) == Some(true);
    let one = |v: &Value| {
        let id = v.get("logical-id")?.as_u64()?;
        Some(Processor { id, online: is(v, "online"), can_go: is(v, "can-offline") })
    };
    Ok(list(&answer).filter_map(one).collect())
}

/// Has the system inside take processors into use, or out of it.
///
/// # Errors
/// Those of asking it; operation failed, when it did not take all.
pub(super) async fn use_processors(
    call: &Call,
    view: &InstanceView,
    changes: &[(u64, bool)],
) -> Result<(), VirError> {
    if changes.is_empty() {
        return Ok(());
    }
    let wanted: Vec<Value> =
        changes.iter().map(|(n, online)| json!({"logical-id": n, "online": online})).collect();
    let done = ask(call, view, "guest-set-vcpus", json!({"vcpus": wanted})).await?;
    match done.as_u64() == Some(changes.len() as u64) {
        true => Ok(()),
        false => {
            let text = "the guest did not take all of the processors";
            Err(VirError::new(Code::OperationFailed, Part::Qemu, text))
        }
    }
}

/// `DOMAIN_SET_GUEST_VCPUS`
pub async fn set_vcpus(call: Call) -> Answered {
    let (named, map, state, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let changes: Vec<(u64, bool)> = processors(&map)?.into_iter().map(|n| (n, state != 0)).collect();
    use_processors(&call, &view, &changes).await?;
    Ok(nothing())
}

const USERS: u32 = 1;
const OS: u32 = 2;
const TIMEZONE: u32 = 4;
const HOSTNAME: u32 = 8;
const FILE_SYSTEMS: u32 = 16;
const DISKS: u32 = 32;
const INTERFACES: u32 = 64;

/// What the agent tells of disks as its system sees them, whole ones and parts of them. Which of the domain's one is its serial number
/// says.
fn disk_fields(answer: &Value, target: impl Fn(&str) -> Option<String>) -> Vec<(String, Typed)> {
    let mut all = vec![("disk.count".to_owned(), Typed::Uint(list(answer).count() as u32))];
    for (n, disk) in list(answer).enumerate() {
        let mut add = |field: String, value: Typed| all.push((format!("disk.{n}.{field}"), value));
        if let Some(name) = text_of(disk, "name") {
            add("name".into(), Typed::Text(name));
        }
        add("partition".into(), Typed::Boolean(disk.get("partition").and_then(Value::as_bool) == Some(true)));
        let parts: Vec<&str> =
            disk.get("dependencies").into_iter().flat_map(list).filter_map(Value::as_str).collect();
        if !parts.is_empty() {
            add("dependency.count".into(), Typed::Uint(parts.len() as u32));
            for (m, name) in parts.into_iter().enumerate() {
                add(format!("dependency.{m}.name"), Typed::Text(plain(name)));
            }
        }
        if let Some(serial) = disk.get("address").and_then(|a| text_of(a, "serial")) {
            let own = target(&serial);
            add("serial".into(), Typed::Text(serial));
            if let Some(own) = own {
                add("alias".into(), Typed::Text(own));
            }
        }
        if let Some(alias) = text_of(disk, "alias") {
            add("guest_alias".into(), Typed::Text(alias));
        }
    }
    all
}

/// Fields of one kind of information.
fn fields(kind: u32, answer: &Value, view: &InstanceView, call: &Call) -> Vec<(String, Typed)> {
    let mut all = vec![];
    let mut add = |field: String, value: Option<String>| {
        all.extend(value.map(|v| (field, Typed::Text(v))));
    };
    match kind {
        OS => {
            for (field, key) in [
                ("id", "id"),
                ("name", "name"),
                ("pretty-name", "pretty-name"),
                ("version", "version"),
                ("version-id", "version-id"),
                ("kernel-release", "kernel-release"),
                ("kernel-version", "kernel-version"),
                ("machine", "machine"),
                ("variant", "variant"),
                ("variant-id", "variant-id"),
            ] {
                add(format!("os.{field}"), text_of(answer, key));
            }
        }
        HOSTNAME => add("hostname".into(), text_of(answer, "host-name")),
        TIMEZONE => {
            add("timezone.name".into(), text_of(answer, "zone"));
            let offset = answer.get("offset").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
            all.extend(offset.map(|n| ("timezone.offset".to_owned(), Typed::Int(n))));
        }
        USERS => {
            all.push(("user.count".into(), Typed::Uint(list(answer).count() as u32)));
            for (n, user) in list(answer).enumerate() {
                let text = |key: &str| text_of(user, key).map(Typed::Text);
                let login = user.get("login-time").and_then(Value::as_f64);
                let login = login.map(|s| Typed::Ullong((s * 1000.0).max(0.0) as u64));
                for (field, value) in
                    [("name", text("user")), ("domain", text("domain")), ("login-time", login)]
                {
                    all.extend(value.map(|v| (format!("user.{n}.{field}"), v)));
                }
            }
        }
        DISKS => {
            let disks = super::figures::disks(&call.session.front.engine.inner().inventory.read(), view);
            all = disk_fields(answer, |serial| by_serial(&disks, serial).map(|d| d.target.clone()));
        }
        FILE_SYSTEMS => {
            all.push(("fs.count".into(), Typed::Uint(list(answer).count() as u32)));
            let shown = file_systems(view, call, answer);
            for (n, f) in list(answer).enumerate() {
                let bytes = |key: &str| f.get(key).and_then(Value::as_u64).map(Typed::Ullong);
                let text = |key: &str| text_of(f, key).map(Typed::Text);
                let disks = shown.get(n).map(|(_, disks)| disks.clone()).unwrap_or_default();
                for (field, value) in [
                    ("mountpoint", text("mountpoint")),
                    ("name", text("name")),
                    ("fstype", text("type")),
                    ("total-bytes", bytes("total-bytes")),
                    ("used-bytes", bytes("used-bytes")),
                    ("disk.count", Some(Typed::Uint(disks.len() as u32))),
                ] {
                    all.extend(value.map(|v| (format!("fs.{n}.{field}"), v)));
                }
                for (m, alias) in disks.into_iter().enumerate() {
                    all.push((format!("fs.{n}.disk.{m}.alias"), Typed::Text(alias)));
                }
            }
        }
        _ => {
            all.push(("if.count".into(), Typed::Uint(list(answer).count() as u32)));
            for (n, nic) in list(answer).enumerate() {
                let mut add = |field: String, value: Typed| all.push((format!("if.{n}.{field}"), value));
                if let Some(name) = text_of(nic, "name") {
                    add("name".into(), Typed::Text(name));
                }
                if let Some(mac) = text_of(nic, "hardware-address") {
                    add("hwaddr".into(), Typed::Text(mac));
                }
                let addresses: Vec<&Value> = nic.get("ip-addresses").into_iter().flat_map(list).collect();
                add("addr.count".into(), Typed::Uint(addresses.len() as u32));
                for (m, address) in addresses.iter().enumerate() {
                    for (field, key) in [("type", "ip-address-type"), ("addr", "ip-address")] {
                        if let Some(text) = text_of(address, key) {
                            add(format!("addr.{m}.{field}"), Typed::Text(text));
                        }
                    }
                    if let Some(prefix) = address.get("prefix").and_then(Value::as_u64) {
                        add(format!("addr.{m}.prefix"), Typed::Uint(prefix.min(128) as u32));
                    }
                }
            }
        }
    }
    all
}

/// `DOMAIN_GET_GUEST_INFO`: what was asked for must be told; of everything, what the agent can.
pub async fn info(call: Call) -> Answered {
    let (named, types, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let kinds = [
        (USERS, "guest-get-users"),
        (OS, "guest-get-osinfo"),
        (TIMEZONE, "guest-get-timezone"),
        (HOSTNAME, "guest-get-host-name"),
        (FILE_SYSTEMS, "guest-get-fsinfo"),
        (DISKS, "guest-get-disks"),
        (INTERFACES, "guest-network-get-interfaces"),
    ];
    let known = kinds.iter().fold(0, |all, (kind, _)| all | kind);
    if types & !known != 0 {
        let text = format!("guest information types 0x{:x} are not told", types & !known);
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    let mut all = vec![];
    for (kind, command) in kinds {
        if types != 0 && types & kind == 0 {
            continue;
        }
        match ask(&call, &view, command, json!({})).await {
            Ok(answer) => all.extend(fields(kind, &answer, &view, &call)),
            Err(e) if types == 0 && e.code == Code::OperationUnsupported => {}
            Err(e) => return Err(e),
        }
    }
    Ok(typed(all).finish().into())
}

/// `DOMAIN_AUTHORIZED_SSH_KEYS_GET`
pub async fn ssh_keys(call: Call) -> Answered {
    let (named, user, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let answer = ask(&call, &view, "guest-ssh-get-authorized-keys", json!({"username": user})).await?;
    let keys: Vec<String> =
        answer.get("keys").into_iter().flat_map(list).filter_map(|k| k.as_str().map(plain)).collect();
    let mut w = Writer::new();
    w.array(&keys, |w, key| {
        w.string(key);
    });
    Ok(w.finish().into())
}

/// `DOMAIN_AUTHORIZED_SSH_KEYS_SET`: replaces them, or adds or removes some.
pub async fn set_ssh_keys(call: Call) -> Answered {
    let (named, user, keys, flags) = call
        .arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.array(2048, |r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, 1 | 2)?;
    let view = call.guest(&named)?;
    let (append, remove) = (flags & 1 != 0, flags & 2 != 0);
    let (command, arguments) = match remove {
        true => ("guest-ssh-remove-authorized-keys", json!({"username": user, "keys": keys})),
        false => {
            let arguments = json!({"username": user, "keys": keys, "reset": !append});
            ("guest-ssh-add-authorized-keys", arguments)
        }
    };
    ask(&call, &view, command, arguments).await?;
    Ok(nothing())
}

/// `DOMAIN_PM_SUSPEND_FOR_DURATION`
pub async fn suspend(call: Call) -> Answered {
    let (named, target, duration, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if duration != 0 {
        let text = "Duration not supported. Use 0 for now";
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    let command = match target {
        0 => "guest-suspend-ram",
        1 => "guest-suspend-disk",
        2 => "guest-suspend-hybrid",
        n => return Err(VirError::argument(format!("Unknown suspend target: {n}"))),
    };
    ask(&call, &view, command, json!({})).await?;
    Ok(nothing())
}

/// How long a command of the agent's protocol may take, as libvirt's clients say it.
fn limit(seconds: i32) -> Result<Duration, VirError> {
    match seconds {
        // As long as it takes, and as long as usual.
        -2 => Ok(AGENT_MAX),
        -1 | 0 => Ok(PATIENCE),
        n => match u64::try_from(n) {
            Ok(n) => Ok(Duration::from_secs(n).min(AGENT_MAX)),
            Err(_) => {
                Err(VirError::argument(format!("guest agent timeout '{n}' is less than the minimum '-2'")))
            }
        },
    }
}

/// `QEMU_DOMAIN_AGENT_COMMAND`
pub async fn command(call: Call) -> Answered {
    let (named, text, seconds, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let wrong = |why: &str| VirError::argument(format!("the command of the guest agent {why}"));
    let mut object: Map<String, Value> =
        serde_json::from_str(&text).map_err(|_| wrong("is no JSON object"))?;
    let name = object.remove("execute");
    let name = name.as_ref().and_then(Value::as_str).ok_or_else(|| wrong("says nothing to \"execute\""))?;
    let arguments = object.remove("arguments").unwrap_or_else(|| json!({}));
    if !arguments.is_object() {
        return Err(wrong("has \"arguments\" that are no object"));
    }
    if let Some(key) = object.keys().find(|k| *k != "id") {
        return Err(wrong(&format!("has {key:?}, which nothing knows")));
    }
    let answer = ask_within(&call, &view, name, arguments, limit(seconds)?).await?;
    let mut w = Writer::new();
    w.optional(Some(&json!({"return": answer}).to_string()));
    Ok(w.finish().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_as_text() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8].into()), "0-2,5,7-8");
        assert_eq!(ranges(&BTreeSet::new()), "");
        assert_eq!(processors("0-2,5").unwrap(), [0, 1, 2, 5]);
        for wrong in ["", "a", "3-1", "0-99999"] {
            assert!(processors(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks_are_told_as_libvirt_names_their_fields() {
        let answer = json!([
            {"name": "/dev/vda", "partition": false, "dependencies": [],
             "address": {"bus-type": "virtio", "serial": "0QEMU_root"}, "alias": "x\ny"},
            {"name": "/dev/vda1", "partition": true, "dependencies": ["/dev/vda"]},
        ]);
        let target = |serial: &str| serial.ends_with("root").then(|| "vda".to_owned());
        let text = |v: &str| Typed::Text(v.into());
        let all = disk_fields(&answer, target);
        let wanted = [
            ("disk.count", Typed::Uint(2)),
            ("disk.0.name", text("/dev/vda")),
            ("disk.0.partition", Typed::Boolean(false)),
            ("disk.0.serial", text("0QEMU_root")),
            ("disk.0.alias", text("vda")),
            ("disk.0.guest_alias", text("xy")),
            ("disk.1.name", text("/dev/vda1")),
            ("disk.1.partition", Typed::Boolean(true)),
            ("disk.1.dependency.count", Typed::Uint(1)),
            ("disk.1.dependency.0.name", text("/dev/vda")),
        ];
        assert_eq!(all, wanted.map(|(field, value)| (field.to_owned(), value)));
    }

    #[test]
    fn limits_of_commands() {
        assert_eq!(limit(-2).unwrap(), AGENT_MAX);
        assert_eq!(limit(7).unwrap(), Duration::from_secs(7));
        assert_eq!(limit(i32::MAX).unwrap(), AGENT_MAX);
        assert!(limit(-3).is_err());
        assert_eq!(plain("a\u{1b}[2J\nb"), "a[2Jb");
    }
}
