//! `/1.0/karst/instances/{name}/vnc`: the display of a virtual machine, and its password. The password itself is in no answer.

use super::exec::show;
use crate::{
    app::Call,
    respond::{Reply, empty, sync},
};
use karst_engine::screens::ScreenListener;
use karst_model::{
    Error, Result,
    display::{DisplayGuard, DisplayPassword, DisplayProtocol},
};
use serde_json::json;

/// `GET /1.0/karst/instances/{name}/vnc`: `{"display", "password", "valid_to"}`: is there one, are viewers asked for a password,
/// and until when that lets them in; and of a running machine `"listeners"`, each `{"kind", "address", "port", "why"}`: `vnc`,
/// `websocket` or `spice`, where it listens, or why it does not.
///
/// # Errors
/// Not found, forbidden.
pub async fn get(call: Call) -> Result<Reply> {
    let state = call.engine().display_state(&call.context, call.project(), call.param(0))?;
    let listener = |l: &ScreenListener| {
        let address = l.at.map(|at| at.ip().to_string());
        json!({"kind": l.kind.as_str(), "address": address, "port": l.at.map(|at| at.port()), "why": l.why})
    };
    let listeners: Vec<_> = state.listeners.iter().map(listener).collect();
    sync(&json!({
        "display": state.there,
        "password": state.password,
        "valid_to": state.valid_to,
        "listeners": listeners,
    }))
}

/// `PUT /1.0/karst/instances/{name}/vnc`: `{"password", "valid_to"}`: from now on viewers have to know this password, until that
/// time (RFC 3339) if one is given.
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let password = DisplayPassword::parse("password", f.need_text("password")?)?;
    let valid_to = f.text("valid_to")?.filter(|t| !t.is_empty()).map(|t| {
        t.parse::<jiff::Timestamp>()
            .map_err(|_| Error::invalid("valid_to", format!("valid_to: {t:?} is not a time (RFC 3339)")))
    });
    let guard = DisplayGuard { password, valid_to: valid_to.transpose()? };
    f.finish(&[])?;
    let project = call.project().to_owned();
    call.engine().display_password_set(&call.context, &project, call.param(0), Some(guard)).await?;
    Ok(empty())
}

/// `DELETE /1.0/karst/instances/{name}/vnc`: viewers are asked for no password any more.
///
/// # Errors
/// Those of the engine; not found also when there is no password.
pub async fn delete(call: Call) -> Result<Reply> {
    let engine = call.engine();
    let state = engine.display_state(&call.context, call.project(), call.param(0))?;
    engine.display_password_set(&call.context, call.project(), call.param(0), None).await?;
    match state.password {
        true => Ok(empty()),
        false => {
            let text = format!("the display of instance {:?} has no password", call.param(0));
            Err(Error::not_found(text))
        }
    }
}

/// `POST /1.0/karst/instances/{name}/vnc`: the display of a virtual machine, as RFB on a websocket; the operation's
/// metadata names its secrets as those of a console (`{"fds": {"0", "control"}}`).
///
/// # Errors
/// Those of the engine.
pub async fn open(call: Call) -> Result<Reply> {
    let (call, f) = call.fields().await?;
    f.finish(&[])?;
    let (project, name) = (call.project(), call.param(0));
    let session =
        call.engine().machine_display(&call.context, project, name, DisplayProtocol::Vnc, false).await?;
    show(call, session, (None, None)).await
}
