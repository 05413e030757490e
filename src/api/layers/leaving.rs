//! An answer's body on its way out. Everything that has to see it end is here, in one
//! body: each wrapper of its own would cost an allocation and a call a frame.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Body as HttpBody;
use tonic::codegen::Bytes;

use super::concurrency::Slot;
use super::identity::Completion;
use super::{panic, shape};

type Frame = http_body::Frame<Bytes>;

/// Shapes errors in its trailers, answers a panic with `INTERNAL`, and keeps the slot
/// and the request's one line of log until it has been sent or given up.
struct Leaving {
    inner: Body,
    /// What has panicked once is not called again.
    panicked: bool,
    completion: Completion,
    _slot: Option<Slot>,
}

/// Sends an answer on its way.
pub(super) fn leave(
    mut response: Response<Body>,
    mut completion: Completion,
    slot: Option<Slot>,
) -> Response<Body> {
    shape::reshape(response.headers_mut());
    completion.sign(response.headers_mut());
    completion.note(response.headers());
    response.map(|inner| {
        Body::new(Leaving {
            inner,
            panicked: false,
            completion,
            _slot: slot,
        })
    })
}

impl HttpBody for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, Status>>> {
        if self.panicked {
            return Poll::Ready(None);
        }
        let polled = {
            let inner = Pin::new(&mut self.inner);
            catch_unwind(AssertUnwindSafe(|| inner.poll_frame(cx)))
        };
        let mut frame = match polled {
            Ok(poll) => match ready!(poll) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            },
            Err(panic) => {
                self.panicked = true;
                let status = self
                    .completion
                    .span()
                    .in_scope(|| panic::status_of(&*panic));
                let mut trailers = HeaderMap::new();
                if let Err(status) = status.add_header(&mut trailers) {
                    return Poll::Ready(Some(Err(status)));
                }
                Frame::trailers(trailers)
            }
        };
        if let Some(trailers) = frame.trailers_mut() {
            shape::reshape(trailers);
            self.completion.note(trailers);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    /// An ended body must stay one, else the headers of a trailers-only answer are sent
    /// without the flag that makes them trailers.
    fn is_end_stream(&self) -> bool {
        self.panicked || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}
