//! Registering for events.

use super::{Answered, Named, int, nothing};
use crate::{
    error::VirError,
    events::{self, Callback, DOMAIN_EVENTS, LIFECYCLE, MOST, Style},
    session::Call,
};

fn add(call: &Call, callback: Callback) -> Result<i32, VirError> {
    let number = events::listen(&call.session, callback)?;
    number.ok_or_else(|| VirError::state(format!("a connection has {MOST} callbacks at most")))
}

fn known(event: i32) -> Result<(), VirError> {
    match (0..DOMAIN_EVENTS).contains(&event) {
        true => Ok(()),
        false => Err(VirError::argument(format!("unsupported event ID {event}"))),
    }
}

fn remove_plain(call: &Call, event: i32) -> usize {
    call.session.callbacks.lock().unwrap_or_else(|e| e.into_inner()).remove_plain(event)
}

/// `CONNECT_DOMAIN_EVENT_REGISTER`
pub async fn register(call: Call) -> Answered {
    add(&call, Callback { style: Style::Plain, event: LIFECYCLE, only: None })?;
    Ok(int(1))
}

/// `CONNECT_DOMAIN_EVENT_DEREGISTER`
pub async fn deregister(call: Call) -> Answered {
    match remove_plain(&call, LIFECYCLE) {
        0 => Err(VirError::argument("domain event 0 not registered")),
        _ => Ok(int(0)),
    }
}

/// `CONNECT_DOMAIN_EVENT_REGISTER_ANY`
pub async fn register_any(call: Call) -> Answered {
    let event = call.arguments(|r| r.i32())?;
    known(event)?;
    add(&call, Callback { style: Style::Plain, event, only: None })?;
    Ok(nothing())
}

/// `CONNECT_DOMAIN_EVENT_DEREGISTER_ANY`
pub async fn deregister_any(call: Call) -> Answered {
    let event = call.arguments(|r| r.i32())?;
    known(event)?;
    match remove_plain(&call, event) {
        0 => Err(VirError::argument(format!("domain event {event} not registered"))),
        _ => Ok(nothing()),
    }
}

/// `CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY`
pub async fn callback_register(call: Call) -> Answered {
    let (event, named) = call.arguments(|r| Ok((r.i32()?, r.option(Named::read_domain)?)))?;
    known(event)?;
    let only = named.map(|n| call.guest(&n).map(|v| crate::domain_uuid(&v))).transpose()?;
    Ok(int(add(&call, Callback { style: Style::Numbered, event, only })?))
}

/// `CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY`
pub async fn callback_deregister(call: Call) -> Answered {
    remove(&call, Style::Numbered)
}

/// `CONNECT_NETWORK_EVENT_REGISTER_ANY`
pub async fn network_register(call: Call) -> Answered {
    let (event, named) = call.arguments(|r| Ok((r.i32()?, r.option(Named::read)?)))?;
    if !(0..=1).contains(&event) {
        return Err(VirError::argument(format!("unsupported network event ID {event}")));
    }
    let only = named.map(|n| n.uuid);
    Ok(int(add(&call, Callback { style: Style::Network, event, only })?))
}

/// `CONNECT_NETWORK_EVENT_DEREGISTER_ANY`
pub async fn network_deregister(call: Call) -> Answered {
    remove(&call, Style::Network)
}

/// `CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY`
pub async fn pool_register(call: Call) -> Answered {
    let (event, named) = call.arguments(|r| Ok((r.i32()?, r.option(Named::read)?)))?;
    // What happens to it, and that it was looked at again.
    if !(0..=1).contains(&event) {
        return Err(VirError::argument(format!("unsupported storage pool event ID {event}")));
    }
    let only = named.map(|n| super::storage::find_uuid(&call, n.uuid).map(|p| p.id.uuid())).transpose()?;
    Ok(int(add(&call, Callback { style: Style::Pool, event, only })?))
}

/// `CONNECT_STORAGE_POOL_EVENT_DEREGISTER_ANY`
pub async fn pool_deregister(call: Call) -> Answered {
    remove(&call, Style::Pool)
}

/// `CONNECT_SECRET_EVENT_REGISTER_ANY`
pub async fn secret_register(call: Call) -> Answered {
    let (event, only) = call.arguments(|r| Ok((r.i32()?, r.option(super::secret::named)?)))?;
    // What happens to it, and that its value is another.
    if !(0..=1).contains(&event) {
        return Err(VirError::argument(format!("unsupported secret event ID {event}")));
    }
    Ok(int(add(&call, Callback { style: Style::Secret, event, only })?))
}

/// `CONNECT_SECRET_EVENT_DEREGISTER_ANY`
pub async fn secret_deregister(call: Call) -> Answered {
    remove(&call, Style::Secret)
}

fn remove(call: &Call, style: Style) -> Answered {
    let number = call.arguments(|r| r.i32())?;
    match call.session.callbacks.lock().unwrap_or_else(|e| e.into_inner()).remove(number, style) {
        true => Ok(nothing()),
        false => Err(VirError::argument(format!("event callback {number} not registered"))),
    }
}
