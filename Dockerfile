# The server alone: it needs a PostgreSQL of its own (REMIT_DATABASE_URL).
FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY Cargo.toml Cargo.lock rust-toolchain.toml build.rs ./
COPY proto proto
COPY migrations migrations
COPY src src
RUN cargo build --release --locked

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/target/release/remit /usr/local/bin/remit
USER 65532:65532
# A container's network is its own: TLS ends at --tls-cert or in front of it.
ENV REMIT_LISTEN=0.0.0.0:50051 \
    REMIT_CYCLES_LISTEN=0.0.0.0:7878 \
    REMIT_INSECURE=true \
    REMIT_LOG_FORMAT=json
EXPOSE 50051 7878
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["remit", "healthcheck"]
ENTRYPOINT ["remit"]
CMD ["serve"]
