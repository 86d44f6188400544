//! What a client may say before it is somebody: SASL with SCRAM-SHA-256 over TLS, the user an API token's name and the
//! password the token. Four procedures and keepalive are answered, everything else is refused; frames are small and few.

use crate::{
    error::{Code, Part, VirError},
    frame::{Frame, Header, KEEPALIVE, Kind, REMOTE, Status},
    xdr::{Reader, Writer},
};
use bytes::Bytes;
use karst_engine::{
    Engine,
    tenancy::scram::{Exchange, MECHANISM},
};
use karst_model::access::Principal;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// `AUTH_LIST`, `AUTH_SASL_INIT`, `AUTH_SASL_START`, `AUTH_SASL_STEP`: all that is answered.
const LIST: i32 = 66;
const INIT: i32 = 67;
const START: i32 = 68;
const STEP: i32 = 69;
/// `REMOTE_AUTH_SASL`
const SASL: u32 = 1;
/// Largest frame and most frames of somebody who is nobody yet, and his failures.
const FRAME: usize = 64 << 10;
const FRAMES: usize = 32;
const FAILURES: usize = 3;
/// Longest message of the mechanism.
const LONGEST: usize = 4096;

fn failed() -> VirError {
    VirError::new(Code::AuthFailed, Part::Rpc, "authentication failed")
}

/// A message as libvirt's protocol has it: a word for each byte.
fn read_message(r: &mut Reader<'_>) -> Result<Vec<u8>, VirError> {
    let absent = r.i32()? != 0;
    let words = r.array(LONGEST, |r| r.u32())?;
    match absent {
        true => Ok(vec![]),
        false => words.into_iter().map(|w| u8::try_from(w & 0xff).map_err(|_| failed())).collect(),
    }
}

fn write_message(complete: bool, message: &[u8]) -> Vec<u8> {
    let mut w = Writer::new();
    w.i32(i32::from(complete)).i32(0);
    w.array(message, |w, byte| {
        w.u32(u32::from(*byte));
    });
    w.finish()
}

/// One client's way to a principal.
struct Login<'a> {
    engine: &'a Engine,
    address: &'a str,
    exchange: Option<Exchange>,
}

impl Login<'_> {
    fn call(&mut self, procedure: i32, payload: &[u8]) -> Result<(Vec<u8>, Option<Principal>), VirError> {
        let mut r = Reader::new(payload);
        let answer = match procedure {
            LIST => {
                let mut w = Writer::new();
                w.array([SASL], |w, kind| {
                    w.u32(kind);
                });
                (w.finish(), None)
            }
            INIT => {
                self.exchange = None;
                let mut w = Writer::new();
                w.string(MECHANISM);
                (w.finish(), None)
            }
            START => {
                if r.string()? != MECHANISM {
                    return Err(failed());
                }
                let first = read_message(&mut r)?;
                let (exchange, said) = self.engine.scram_begin(&first).map_err(|_| failed())?;
                self.exchange = Some(exchange);
                (write_message(false, &said), None)
            }
            STEP => {
                let exchange = self.exchange.take().ok_or_else(failed)?;
                let last = read_message(&mut r)?;
                let done = self.engine.scram_finish(exchange, &last, self.address);
                let (principal, said) = done.map_err(|_| failed())?;
                (write_message(true, &said), Some(principal))
            }
            _ => return Err(VirError::new(Code::AuthFailed, Part::Rpc, "authentication required")),
        };
        r.end()?;
        Ok(answer)
    }
}

/// Answers until the client is somebody; nobody when it gives up or goes on failing.
///
/// # Errors
/// Those of the transport; invalid data for what is no frame.
pub async fn negotiate(
    engine: &Engine,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    address: &str,
) -> io::Result<Option<Principal>> {
    let mut login = Login { engine, address, exchange: None };
    let mut failures = 0;
    for _ in 0..FRAMES {
        let Some(Frame { header, payload }) = Frame::read_within(stream, FRAME).await? else {
            return Ok(None);
        };
        let (reply, principal) = match (header.program, header.kind) {
            (KEEPALIVE, Kind::Message) if header.procedure == 1 => {
                (Frame::new(Header { procedure: 2, ..header }, Bytes::new()), None)
            }
            (REMOTE, Kind::Call) if header.version == 1 => match login.call(header.procedure, &payload) {
                Ok((said, principal)) => (Frame::new(header.reply(Status::Ok), said), principal),
                Err(e) => {
                    failures += 1;
                    (Frame::error(header, &e), None)
                }
            },
            (_, Kind::Call) => {
                failures += 1;
                (Frame::error(header, &failed()), None)
            }
            _ => return Ok(None),
        };
        stream.write_all(&reply.encode()).await?;
        stream.flush().await?;
        if principal.is_some() {
            return Ok(principal);
        }
        if failures >= FAILURES {
            break;
        }
    }
    tracing::info!(address, "a client of libvirt could not log in");
    Ok(None)
}
