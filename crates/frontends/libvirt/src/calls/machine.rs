//! A running machine: its memory kept over a stop, its screen, its keyboard; and jobs.

use super::{
    Answered, Named,
    define::redefine_saved,
    domain::{is_running, set_keys},
    int,
    memory::wanted_state,
    nothing,
    power::{ended, save},
    text,
    transfer::sent,
};
use crate::{
    error::{Code, Part, VirError},
    frame::{Frame, Header, Status},
    session::{Answer, Call, Input, Session},
    xdr::Writer,
};
use bytes::Bytes;
use karst_engine::InstanceView;
use karst_model::instance::Status as State;
use std::{os::fd::OwnedFd, sync::Arc};
use tokio::io::AsyncReadExt;

fn unsupported(text: &str) -> VirError {
    VirError::new(Code::OperationUnsupported, Part::Qemu, text)
}

/// The key that says that a domain whose memory is kept stands still when it goes on, as libvirt writes it before the memory.
const STANDS_STILL: &str = "user.libvirt.saved_paused";

fn stands_still(view: &InstanceView) -> bool {
    view.instance.config.get(STANDS_STILL).is_some_and(|still| still == "true")
}

/// Does a start of this domain from its memory leave it standing still?
pub(super) fn goes_on_paused(view: &InstanceView) -> bool {
    view.instance.stateful && stands_still(view)
}

/// Notes whether a domain is to stand still when it goes on from its memory.
///
/// # Errors
/// Those of the engine.
pub(super) async fn note_paused(call: &Call, view: &InstanceView, paused: bool) -> Result<(), VirError> {
    if stands_still(view) == paused {
        return Ok(());
    }
    let key = (STANDS_STILL.to_owned(), paused.then(|| "true".to_owned()));
    set_keys(call, view, vec![key], None).await
}

/// `DOMAIN_MANAGED_SAVE`: memory is kept, and the domain stops; the next start goes on from there, as it was or as flags say.
pub async fn managed_save(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    // Past the cache.
    let wanted = wanted_state(&call, flags, 1)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    note_paused(&call, &view, wanted.unwrap_or(view.status == State::Frozen)).await?;
    if let Err(e) = save(&call, &*call.guest(&named)?).await {
        // What is not kept does not go on.
        note_paused(&call, &*call.guest(&named)?, false).await?;
        return Err(e);
    }
    Ok(nothing())
}

/// Is there memory to go on from?
fn has_saved(view: &InstanceView) -> bool {
    view.instance.stateful && !is_running(view)
}

/// `DOMAIN_MANAGED_SAVE_REMOVE`; fine when nothing was saved.
pub async fn managed_save_remove(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    if has_saved(&view) {
        let session = &call.session;
        let (engine, context) = (&session.front.engine, &session.context);
        let (project, name) = (&view.project.name, &view.instance.name);
        ended(engine.instance_memory_drop(context, project, name).await?).await?;
        note_paused(&call, &*call.session.guest(name)?, false).await?;
    }
    Ok(nothing())
}

fn demand_saved(view: &InstanceView) -> Result<(), VirError> {
    match has_saved(view) {
        true => Ok(()),
        false => Err(VirError::state("domain does not have managed save image")),
    }
}

/// `DOMAIN_MANAGED_SAVE_GET_XML_DESC`: it goes on as the machine that it is, which a start from memory demands.
pub async fn managed_save_xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    // With what is secret: the password of the screen.
    call.known_flags(flags, 1)?;
    if flags & 1 != 0 && call.session.read_only() {
        let text = "virDomainManagedSaveGetXMLDesc with secure flag";
        return Err(VirError::new(Code::OperationDenied, Part::Qemu, text));
    }
    let view = call.guest(&named)?;
    demand_saved(&view)?;
    Ok(text(&crate::xml::domain::shown(&call, &view, true, flags & 1 != 0)?))
}

/// `DOMAIN_MANAGED_SAVE_DEFINE_XML`: there is no document beside the domain's, so it is that which changes.
pub async fn managed_save_define(call: Call) -> Answered {
    let (named, document, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.option(|r| r.string())?, r.u32()?)))?;
    let wanted = wanted_state(&call, flags, 0)?;
    let view = call.guest(&named)?;
    demand_saved(&view)?;
    if let Some(text) = document {
        redefine_saved(&call, &view, &text).await?;
    }
    if let Some(paused) = wanted {
        note_paused(&call, &*call.guest(&named)?, paused).await?;
    }
    Ok(nothing())
}

/// `DOMAIN_SCREENSHOT`: a PNG file as a stream.
pub async fn screenshot(call: Call) -> Answered {
    let (named, screen, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if screen != 0 {
        return Err(VirError::argument("currently is supported only taking screenshots of screen ID 0"));
    }
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let fd = engine.machine_screenshot(context, &view.project.name, &view.instance.name).await?;
    let input = session.stream(call.header)?;
    let mut w = Writer::new();
    w.optional(Some("image/png"));
    let then = give(session.clone(), call.header, fd, input);
    Ok(Answer { payload: w.finish(), fds: vec![], then: Some(Box::pin(then)) })
}

/// Gives what a descriptor holds to the client's stream. At its end an empty frame says so, and the client finishes.
async fn give(session: Arc<Session>, header: Header, fd: OwnedFd, mut input: Input) {
    let read = async {
        // A file, on which there is nothing to wait for.
        let mut reader = tokio::fs::File::from_std(std::fs::File::from(fd));
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = reader.read(&mut buffer).await?;
            let data = Bytes::copy_from_slice(&buffer[..n]);
            session.send(Frame::new(header.stream(Status::Continue), data)).await;
            if n == 0 {
                return std::io::Result::Ok(());
            }
        }
    };
    let outcome = tokio::select! {
        outcome = read => outcome,
        () = session.ended() => Ok(()),
    };
    sent(&session, header, &mut input, outcome.map_err(|e| karst_model::Error::from(e).into())).await;
}

/// QEMU's names of Linux' key codes from 1.
const KEYS: &[&str] = &[
    "esc",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "0",
    "minus",
    "equal",
    "backspace",
    "tab",
    "q",
    "w",
    "e",
    "r",
    "t",
    "y",
    "u",
    "i",
    "o",
    "p",
    "bracket_left",
    "bracket_right",
    "ret",
    "ctrl",
    "a",
    "s",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "semicolon",
    "apostrophe",
    "grave_accent",
    "shift",
    "backslash",
    "z",
    "x",
    "c",
    "v",
    "b",
    "n",
    "m",
    "comma",
    "dot",
    "slash",
    "shift_r",
    "kp_multiply",
    "alt",
    "spc",
    "caps_lock",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "f6",
    "f7",
    "f8",
    "f9",
    "f10",
    "num_lock",
    "scroll_lock",
    "kp_7",
    "kp_8",
    "kp_9",
    "kp_subtract",
    "kp_4",
    "kp_5",
    "kp_6",
    "kp_add",
    "kp_1",
    "kp_2",
    "kp_3",
    "kp_0",
    "kp_decimal",
    "",
    "",
    "less",
    "f11",
    "f12",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "kp_enter",
    "ctrl_r",
    "kp_divide",
    "sysrq",
    "alt_r",
    "",
    "home",
    "up",
    "pgup",
    "left",
    "right",
    "end",
    "down",
    "pgdn",
    "insert",
    "delete",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "pause",
    "",
    "",
    "",
    "",
    "",
    "meta_l",
    "meta_r",
    "menu",
];

/// The name of a key.
fn key(code: u32) -> Option<&'static str> {
    KEYS.get(usize::try_from(code).ok()?.checked_sub(1)?).copied().filter(|k| !k.is_empty())
}

/// `DOMAIN_SEND_KEY`: all at once, as one chord.
pub async fn send_key(call: Call) -> Answered {
    let (named, codes, codeset, flags) = call.arguments(|r| {
        let (named, codeset, _hold) = (Named::read_domain(r)?, r.u32()?, r.u32()?);
        Ok((named, r.array(16, crate::xdr::Reader::u32)?, codeset, r.u32()?))
    })?;
    call.known_flags(flags, 0)?;
    // Those of Linux, to which virsh translates names.
    if codeset != 0 {
        return Err(unsupported("key codes are those of Linux (--codeset linux)"));
    }
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let unknown = |code: &u32| VirError::argument(format!("the key code {code} is not known"));
    let chord: Vec<&str> =
        codes.iter().map(|c| key(*c).ok_or_else(|| unknown(c))).collect::<Result<_, VirError>>()?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.machine_keys(context, &view.project.name, &view.instance.name, &[chord.join("-")]).await?;
    Ok(nothing())
}

/// `DOMAIN_HAS_MANAGED_SAVE_IMAGE`
pub async fn has_managed_save(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    Ok(int(i32::from(has_saved(&view))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_keys() {
        let all = [1, 2, 14, 28, 29, 30, 42, 56, 57, 59, 68, 87, 96, 97, 100, 103, 111, 119, 125];
        let names: Vec<_> = all.iter().map(|c| key(*c).unwrap_or_default()).collect();
        let wanted = [
            "esc",
            "1",
            "backspace",
            "ret",
            "ctrl",
            "a",
            "shift",
            "alt",
            "spc",
            "f1",
            "f10",
            "f11",
            "kp_enter",
            "ctrl_r",
            "alt_r",
            "up",
            "delete",
            "pause",
            "meta_l",
        ];
        assert_eq!(names, wanted);
        assert_eq!((key(0), key(84), key(5000)), (None, None, None));
        let texts: Vec<String> = KEYS.iter().filter(|k| !k.is_empty()).map(|k| (*k).to_owned()).collect();
        assert!(karst_model::keyboard::chords(&texts).is_ok());
    }
}
